"""Files are written whole or not at all: on a full disk, by a process that is killed, and by several at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import toy
from trimtab import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from trimtab.core import saving
from trimtab.core.io import locate
from trimtab.core.saving import JOURNAL, reading, write_whole
from trimtab.errors import AdapterFileError
from trimtab.files import card, store


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill is no power cut: what a process wrote is there, whether the disk has it or not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


CONFIG = LoraConfig(r=4, target_modules=["up", "down", "head"])


def in_a_child(run: Callable[[], object]) -> int:
    """Run something in a forked process: 0 if it went well, 1 if it raised, minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            run()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill_the_disk(limit: int) -> None:
    """No file of this process may grow beyond `limit` bytes: writes fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def sevens() -> Any:
    """Such a model, all sevens."""
    model = get_peft_model(toy(), CONFIG)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """(a folder with a saved adapter, what its files hold)."""
    folder = tmp_path / "adapter"
    get_peft_model(toy(), CONFIG).save_pretrained(folder)
    return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_whole(folder: Path, before: dict[str, bytes]) -> None:
    assert {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")} == before
    loaded = PeftModel.from_pretrained(toy(), folder)
    assert not (loaded.base_model.model.up.lora_A["default"].weight == 7).any()


# ---------------------------------------------------------------------- a full disk, a kill
def test_a_child_that_does_nothing_ends_well() -> None:
    assert in_a_child(lambda: None) == 0


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("limit", [1, 400, 1000])
def test_a_disk_that_is_full_while_saving_leaves_the_old_files(limit: int, safe: bool, saved: Any) -> None:
    folder, before = saved
    model = sevens()

    def run() -> None:
        fill_the_disk(limit)
        model.save_pretrained(folder, safe_serialization=safe)

    assert in_a_child(run) == 1
    assert_whole(folder, before)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no half-written file is left"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("limit", [1, 400, 1000])
def test_a_full_disk_for_a_new_folder_leaves_no_adapter(limit: int, safe: bool, tmp_path: Path) -> None:
    model = sevens()

    def run() -> None:
        fill_the_disk(limit)
        model.save_pretrained(tmp_path / "new", safe_serialization=safe)

    assert in_a_child(run) == 1
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(AdapterFileError, match="Can't find"):
        PeftModel.from_pretrained(toy(), tmp_path / "new")


@pytest.mark.parametrize("writer", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_saving_leaves_the_old_files(writer: str, when: str, saved: Any) -> None:
    """The process dies by SIGKILL just before or after one of the files is written."""
    folder, before = saved
    model = sevens()
    config = model.peft_config["default"]
    files = {**store.writers(folder, config, get_peft_model_state_dict(model)), **card.writers(folder, config)}
    assert {p.name for p in files} == set(before)

    def armed(path: Path, write: Callable[[Path], None]) -> Callable[[Path], None]:
        def run(target: Path) -> None:
            for moment in ("before", "after"):
                if path.name == writer and moment == when:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before":
                    write(target)

        return run

    assert in_a_child(lambda: store.save({p: armed(p, w) for p, w in files.items()})) == -signal.SIGKILL
    assert_whole(folder, before)
    get_peft_model(toy(seed=3), CONFIG).save_pretrained(folder)  # and the folder can be saved to again
    PeftModel.from_pretrained(toy(), folder)


def test_saving_into_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(OSError, match=r"blocked|Not a directory|exists"):
        get_peft_model(toy(), CONFIG).save_pretrained(tmp_path / "blocked" / "adapter")


# ---------------------------------------------------------------------- write_whole
def test_all_or_none(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "deep" / "b"
    a.write_text("old")

    def fails(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_whole({a: lambda p: p.write_text("new") and None, b: fails})
    assert a.read_text() == "old"
    assert set(tmp_path.rglob("*")) == {a, tmp_path / "deep"}
    write_whole({a: lambda p: p.write_text("new") and None, b: lambda p: p.write_text("b") and None})
    assert (a.read_text(), b.read_text()) == ("new", "b")
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_whole({tmp_path / "whole": lambda p: p.write_text("x") and None})
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_of_several_folders_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_whole({})
    write_whole({Path("a"): texts("1"), Path("deep/b"): texts("2"), Path("deep/er/c"): texts("3")})
    assert sorted(str(p) for p in Path().rglob("*") if p.is_file()) == ["a", "deep/b", "deep/er/c"]


# ---------------------------------------------------------------------- a folder is one save or the other
# What is saved over and over: versions differ in the config, in every tensor's values and in the tensors' shapes.
VERSIONS = (2, 3, 5)


def texts(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def models(names: tuple[str, ...]) -> dict[int, PeftModel]:
    """A model for each version, whose adapters have its number as rank, alpha and in every entry."""
    found = {}
    for r in VERSIONS:
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["up", "head"])
        model = get_peft_model(toy(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.fill_(r)
        found[r] = model
    return found


def version(folder: Path) -> int | None:
    """Which version an adapter's folder is, whole; None where it is none yet."""
    with reading(folder):
        if not folder.is_dir() or locate(folder, "adapter_config.json") is None:
            return None
        config, tensors = PeftConfig.from_pretrained(folder), load_peft_weights(folder)
    assert config.r == config.lora_alpha
    assert len(tensors) == 4
    for key, tensor in tensors.items():
        assert (tensor == config.r).all()
        assert tensor.shape[0 if "lora_A" in key else 1] == config.r
    return config.r


def plain_version(folder: Path) -> int | None:
    """The same to a program that knows nothing of our journal."""
    if not (folder / "adapter_config.json").is_file():
        return None
    r = json.loads((folder / "adapter_config.json").read_text())["r"]
    files = [p for p in (folder / store.WEIGHTS, folder / store.PICKLED) if p.is_file()]
    assert len(files) == 1
    tensors = load_file(files[0]) if files[0].suffix == ".safetensors" else torch.load(files[0])
    assert all((t == r).all() for t in tensors.values())
    return int(r)


def left_over(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.name.startswith("."))


def save_without_end(root: Path, all_models: dict[int, PeftModel], seed: int) -> None:
    """What a child does until it is killed."""
    draw = random.Random(seed)
    while True:
        all_models[draw.choice(VERSIONS)].save_pretrained(root, safe_serialization=draw.random() < 0.7)


def kill_many_times(root: Path, names: tuple[str, ...], times: int) -> None:
    """Kill a saving process `times` times at random moments; look at the folders after each."""
    all_models = models(names)
    folders = [store.folder_of(root, name) for name in names]
    draw, seen = random.Random(0), set()
    for i in range(times):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_without_end(root, all_models, i)
            os._exit(1)
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for folder in folders:
            plain_version(folder)  # one save, or none
        now = [version(f) for f in folders]
        assert len(set(now)) == 1, f"adapters of several saves lie side by side: {now}"
        seen.add(now[0])
        if i % 5 == 4:
            all_models[VERSIONS[i % 3]].save_pretrained(root)
            assert left_over(root) == [], "the next save clears what the killed one left"
            assert {version(f) for f in folders} == {VERSIONS[i % 3]}
            assert [plain_version(f) for f in folders] == [VERSIONS[i % 3]] * len(folders)
    if times >= 100:
        assert seen >= set(VERSIONS), "the kills came at all times"


@pytest.mark.parametrize("names", [("default",), ("default", "second", "third")], ids=["one", "three"])
def test_a_save_killed_at_random_moments(names: tuple[str, ...], tmp_path: Path) -> None:
    kill_many_times(tmp_path, names, 15)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("default",), ("default", "second", "third")], ids=["one", "three"])
def test_a_save_killed_at_random_moments_many_times(names: tuple[str, ...], tmp_path: Path) -> None:
    kill_many_times(tmp_path, names, 200)


# A kill between any two steps of a save, one after the other: what random moments seldom hit.
STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def killed_at_step(n: int, run: Callable[[], object]) -> bool:
    """Run in a child that dies at the n-th change it makes to folders; whether it came so far."""

    def arm() -> None:
        count = 0

        def counted(event: str, args: Any) -> None:
            nonlocal count
            if event in STEPS:
                count += 1
                if count > n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(counted)
        run()

    return in_a_child(arm) == -signal.SIGKILL


def every_step(root: Path, names: tuple[str, ...], safe: bool, start: bool) -> Iterator[int]:
    """Kill the save of version 3 over one of version 2 (or over nothing) at each step, until one ends well."""
    all_models = models(names)
    for n in range(100):
        folder = root / str(n)
        if start:
            all_models[2].save_pretrained(folder)
        died = killed_at_step(n, lambda f=folder: all_models[3].save_pretrained(f, safe_serialization=safe))  # type: ignore[misc]
        yield n
        if not died:
            assert n > 5
            return
    raise AssertionError("the save never ended")


@pytest.mark.parametrize("start", [True, False], ids=["over", "new"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=["one", "two"])
def test_a_kill_at_every_step(names: tuple[str, ...], safe: bool, start: bool, tmp_path: Path) -> None:
    seen = []
    for n in every_step(tmp_path, names, safe, start):
        root = tmp_path / str(n)
        folders = [store.folder_of(root, name) for name in names]
        for folder in folders:
            assert plain_version(folder) in (None, 2, 3)
        now = {version(f) for f in folders}
        assert len(now) == 1
        seen += now
        saved = store.saved_adapters(root) if root.is_dir() else []
        assert saved == (list(names) if now != {None} else [])
        LoraConfig(r=7, lora_alpha=7).save_pretrained(root)
        assert left_over(root) == []
        assert json.loads((root / "adapter_config.json").read_text())["r"] == 7
    assert seen == sorted(seen, key=lambda v: v or 0)
    assert set(seen) == {2 if start else None, 3}


def half_moved(root: Path) -> None:
    """A folder whose save of version 3 over version 2 was killed when the old seal was gone, and no more."""
    all_models = models(("default", "second"))
    for n in range(100):
        all_models[2].save_pretrained(root)
        assert killed_at_step(n, lambda: all_models[3].save_pretrained(root))
        if not (root / "adapter_config.json").is_file():
            assert (root / JOURNAL).is_dir()
            return


def test_a_load_reads_through_the_journal_and_changes_nothing(tmp_path: Path) -> None:
    half_moved(tmp_path)
    before = sorted(map(str, tmp_path.rglob("*")))
    assert version(tmp_path) == version(tmp_path / "second") == 3
    assert store.saved_adapters(tmp_path) == ["default", "second"]
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_what_others_saved_since_is_kept(tmp_path: Path) -> None:
    """A journal is of no account in a folder that another program has saved to since."""
    half_moved(tmp_path)
    models(("default",))[5].save_pretrained(tmp_path / "other")
    for folder in (tmp_path, tmp_path / "second"):
        for name in ("adapter_config.json", store.WEIGHTS):
            (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert version(tmp_path) == version(tmp_path / "second") == 5


def test_saving_to_one_adapters_folder_finishes_the_save_of_all(tmp_path: Path) -> None:
    half_moved(tmp_path)
    models(("default",))[5].save_pretrained(tmp_path / "second")
    assert (version(tmp_path), version(tmp_path / "second")) == (3, 5)
    assert left_over(tmp_path) == []


def test_a_damaged_journal_is_cleared_away(tmp_path: Path) -> None:
    models(("default",))[2].save_pretrained(tmp_path)
    beyond = '{"files": [], "seals": [], "remove": ["../outside"]}'
    (tmp_path.parent / "outside").write_text("kept")
    for text in ("", "{", "[]", '{"seals": 3}', "null", beyond, beyond.replace("../", "a/b/")):
        (tmp_path / JOURNAL).mkdir()
        (tmp_path / JOURNAL / saving.MANIFEST).write_text(text)
        assert version(tmp_path) == 2
        models(("default",))[3].save_pretrained(tmp_path)
        assert version(tmp_path) == 3
        assert left_over(tmp_path) == []
        models(("default",))[2].save_pretrained(tmp_path)
    assert (tmp_path.parent / "outside").read_text() == "kept"


# ---------------------------------------------------------------------- several at once
def test_several_processes_save_to_one_folder_and_one_reads(tmp_path: Path) -> None:
    all_models = models(("default", "second"))
    all_models[2].save_pretrained(tmp_path)
    children = []
    for i in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                draw = random.Random(i)
                for _ in range(12):
                    all_models[draw.choice(VERSIONS)].save_pretrained(tmp_path, safe_serialization=draw.random() < 0.7)
                code = 0
            os._exit(code)
        children.append(child)
    running, seen = set(children), []
    while running:
        seen += [version(tmp_path), version(tmp_path / "second")]
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                running.discard(child)
    assert set(seen) <= set(VERSIONS)
    assert left_over(tmp_path) == []
    assert version(tmp_path) == version(tmp_path / "second") == plain_version(tmp_path)


def test_another_save_that_lives_is_not_cleared_away(tmp_path: Path) -> None:
    def slow(path: Path) -> None:
        path.write_text("slow")
        write_whole({tmp_path / "fast": texts("fast")})
        assert path.read_text() == "slow"

    write_whole({tmp_path / "slow": slow})
    assert {p.name for p in tmp_path.iterdir()} == {"slow", "fast"}


def test_a_reader_that_was_stopped_holds_no_save_up_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.05)
    all_models = models(("default",))
    all_models[2].save_pretrained(tmp_path)
    with reading(tmp_path):
        all_models[3].save_pretrained(tmp_path)
    assert version(tmp_path) == 3


@pytest.mark.parametrize("system", ["no locks", "no fcntl"])
def test_where_there_are_no_locks_saves_are_whole_all_the_same(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "no fcntl":
        monkeypatch.setattr(saving, "fcntl", None)
    else:
        monkeypatch.setattr(saving.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(95, "not supported")))
    half_moved(tmp_path)
    assert version(tmp_path) == version(tmp_path / "second") == 3
    models(("default", "second"))[5].save_pretrained(tmp_path)
    assert version(tmp_path) == version(tmp_path / "second") == 5
    assert not (tmp_path / JOURNAL).exists()


# ---------------------------------------------------------------------- what cannot be written
def without_rights(run: Callable[[], object]) -> int:
    """Run in a child that is nobody in particular."""

    def drop() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        run()

    return in_a_child(drop)


def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    model = models(("default",))[2]
    model.save_pretrained(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o555 if folder == tmp_path / "adapter" else 0o755)
    said = tmp_path / "said"
    said.write_text("")
    said.chmod(0o666)

    def save() -> None:
        try:
            models(("default",))[3].save_pretrained(tmp_path / "adapter")
        except OSError as error:
            said.write_text(str(error))
            raise

    assert without_rights(save) == 1
    assert str(tmp_path / "adapter") in said.read_text()
    assert without_rights(lambda: version(tmp_path / "adapter") == 2 or os._exit(3)) == 0
    assert version(tmp_path / "adapter") == plain_version(tmp_path / "adapter") == 2
    assert left_over(tmp_path) == []
