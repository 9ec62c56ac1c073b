"""Files of an adapter are found, and what is there instead is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.models import llama, toy
from trimtab import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from trimtab.core.io import locate, split_hub_arguments
from trimtab.errors import AdapterFileError

CONFIG = LoraConfig(r=4, target_modules=["up", "down", "head"])


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


# ---------------------------------------------------------------------- what is there instead
def test_a_run_folder_names_the_adapters_below_it(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        LoraConfig().save_pretrained(tmp_path / f"checkpoint-{step}")
    for load in (
        lambda: PeftModel.from_pretrained(toy(), tmp_path),
        lambda: PeftConfig.from_pretrained(tmp_path),
        lambda: load_peft_weights(tmp_path),
        lambda: get_peft_model(toy(), CONFIG).load_adapter(tmp_path, "other"),
    ):
        with pytest.raises(
            AdapterFileError, match=r"adapters below it, in 'checkpoint-9', 'checkpoint-10', 'checkpoint-100'"
        ):
            load()
    (tmp_path / "run").mkdir()
    for name in [p.name for p in tmp_path.iterdir() if p.name != "run"]:
        (tmp_path / name).rename(tmp_path / "run" / name)
    with pytest.raises(AdapterFileError, match="'run/checkpoint-10'"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_whole_model_is_called_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    for load in (lambda: PeftModel.from_pretrained(llama(), tmp_path), lambda: load_peft_weights(tmp_path)):
        with pytest.raises(AdapterFileError, match="holds a whole model, not an adapter: load it with from_pretrained"):
            load()


def test_another_folder_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="It holds nothing"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterFileError, match=r"It holds \['notes.txt'\]"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_instead_of_its_folder(tmp_path: Path) -> None:
    get_peft_model(toy(), CONFIG).save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with pytest.raises(AdapterFileError, match=r"that is a file\. Name the folder it lies in"):
            PeftModel.from_pretrained(toy(), tmp_path / name)


def test_the_subfolder_is_named(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="nowhere"):
        PeftConfig.from_pretrained(tmp_path, subfolder="nowhere")
