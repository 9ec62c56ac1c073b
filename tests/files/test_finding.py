"""A folder that is no adapter: the error says what it is, and which folder was probably meant."""

from __future__ import annotations

import shutil

import pytest

from tests.folders import adapter_folder, base_folder
from trimtab.errors import AdapterFileError
from trimtab.files.finding import adapter_folder as find
from trimtab.files.finding import is_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    base_folder(root / "base")
    adapter_folder(root / "a", root / "base")
    for step in (20, 100, 3):
        shutil.copytree(root / "a", root / "run" / f"checkpoint-{step}")
    return root


def test_an_adapter_is_itself(root) -> None:
    assert find(root / "a") == str(root / "a")
    assert is_adapter(root / "a")
    assert not is_adapter(root / "base")
    assert not is_adapter("smollm2-135m-instruct")
    assert not is_adapter(root / "model.gguf")


def test_a_run_names_its_checkpoints_the_latest_last(root) -> None:
    with pytest.raises(AdapterFileError, match=r"folder of adapters.*checkpoint-3, .*checkpoint-20, .*checkpoint-100"):
        find(root / "run")


def test_a_whole_model_says_that_it_is_one(root) -> None:
    with pytest.raises(AdapterFileError, match="is a whole model, not an adapter"):
        find(root / "base")


def test_a_file_names_its_folder(root) -> None:
    with pytest.raises(AdapterFileError, match=f"Give the adapter's folder: {root / 'a'}"):
        find(root / "a" / "adapter_model.safetensors")


def test_a_config_without_weights_and_an_adapter_of_mlx(root, tmp_path) -> None:
    shutil.copy(root / "a" / "adapter_config.json", tmp_path)
    with pytest.raises(AdapterFileError, match="no weights"):
        find(tmp_path)
    (tmp_path / "adapters.safetensors").touch()
    with pytest.raises(AdapterFileError, match="MLX"):
        find(tmp_path)


def test_an_empty_folder_and_none(tmp_path) -> None:
    with pytest.raises(AdapterFileError, match=r"holds no adapter_config\.json"):
        find(tmp_path)
    with pytest.raises(AdapterFileError, match="there is no such folder"):
        find(tmp_path / "nowhere")
