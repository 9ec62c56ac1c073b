"""Files are found, and written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import toy
from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.core.io import locate, split_hub_arguments, write_whole
from trimtab.errors import AdapterFileError

CONFIG = LoraConfig(r=4, target_modules=["up", "down", "head"])

CHILD = """
    import sys
    sys.path[:0] = {path!r}
    import torch
    from tests.models import toy
    from trimtab import LoraConfig, get_peft_model
    model = get_peft_model(toy(), LoraConfig(r=4, target_modules=["up", "down", "head"]))
    for p in model.parameters():
        p.data.fill_(7)
"""


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that has such a model, all sevens, as `model`."""
    text = textwrap.dedent(CHILD).format(path=sys.path) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)


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
def test_a_disk_that_is_full_while_saving_leaves_the_old_files(saved: Any) -> None:
    folder, before = saved
    done = child(f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # no file may grow beyond: the writes fail, as on a full disk
        try:
            model.save_pretrained({str(folder)!r})
        except Exception as error:
            print("failed:", type(error).__name__)
    """)
    assert done.returncode == 0, done.stderr
    assert "failed:" in done.stdout
    assert_whole(folder, before)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no half-written file is left"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("limit", [1, 100, 1500])
def test_a_full_disk_for_a_new_folder_leaves_no_adapter(safe: bool, limit: int, tmp_path: Path) -> None:
    done = child(f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            model.save_pretrained({str(tmp_path / "new")!r}, safe_serialization={safe})
        except Exception as error:
            print("failed:", type(error).__name__)
    """)
    assert "failed:" in done.stdout, done.stderr
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(AdapterFileError, match="Can't find"):
        PeftModel.from_pretrained(toy(), tmp_path / "new")


@pytest.mark.parametrize("writer", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_saving_leaves_the_old_files(saved: Any, writer: str, when: str) -> None:
    """The process dies by SIGKILL just before or after one of the files is written."""
    folder, before = saved
    done = child(f"""
        import os, signal
        from trimtab.files import store

        original = store.write_whole
        def deadly(files):
            def armed(path, write):
                def run(target):
                    if path.name == {writer!r} and {when!r} == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    write(target)
                    if path.name == {writer!r}:
                        os.kill(os.getpid(), signal.SIGKILL)
                return run
            original({{p: armed(p, w) for p, w in files.items()}})
        store.write_whole = deadly
        model.save_pretrained({str(folder)!r})
        print("survived")
    """)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "survived" not in done.stdout
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
    assert list(tmp_path.rglob("*")) == [a, tmp_path / "deep"]
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
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(torch.ones(1, 2, dtype=torch.long)), model.eval()(torch.ones(1, 2, dtype=torch.long)))
