"""Files are found, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import toy
from trimtab import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from trimtab.core.io import locate, split_hub_arguments, write_whole
from trimtab.errors import AdapterFileError
from trimtab.files import card, store

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


# ---------------------------------------------------------------------- locate
def test_locate_in_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    assert locate(tmp_path, "file", subfolder="sub") == tmp_path / "sub" / "file"
    assert locate(str(tmp_path / "sub"), "file") == tmp_path / "sub" / "file"
    assert locate(tmp_path, "file") is None


@pytest.mark.parametrize("name", ["absent/deeper/still", "./absent", "../absent"])
def test_a_path_that_is_no_folder_is_never_asked_of_the_hub(name: str) -> None:
    with pytest.raises(AdapterFileError, match="there is no such folder"):
        locate(name, "file")


def test_a_hub_id_offline_says_that_the_hub_cannot_be_reached() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(AdapterFileError, match="no folder here, and the Hub cannot be reached"):
        locate("somebody/no-such-adapter", "adapter_config.json")


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(AdapterFileError, match="Can't find 'f' at"):
        locate("not a valid id!", "f")


def test_hub_arguments_are_split_off() -> None:
    hub, rest = split_hub_arguments({"revision": "a", "token": "t", "r": 4, "subfolder": "s"})
    assert hub == {"revision": "a", "token": "t", "subfolder": "s"}
    assert rest == {"r": 4}
    hub, rest = split_hub_arguments({"use_auth_token": "t"})
    assert (hub, rest) == ({"token": "t"}, {})


def test_saving_uses_no_network(tmp_path: Path) -> None:
    """A base model named like a Hub id is not looked up, however long the network takes."""
    model = get_peft_model(toy(), CONFIG)
    model.peft_config["default"].base_model_name_or_path = "somebody/no-such-model"
    model.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(toy(), tmp_path)(torch.ones(1, 2, dtype=torch.long)),
        model.eval()(torch.ones(1, 2, dtype=torch.long)),
    )
