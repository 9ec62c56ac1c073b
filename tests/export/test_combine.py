"""Adapters combined from their files are what `add_weighted_adapter` makes of them on the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.models import llama, logits, tokens
from trimtab import IA3Config, LoraConfig, PeftModel, get_peft_model, load_peft_weights
from trimtab.cli import app
from trimtab.errors import ConfigError, ExportError
from trimtab.export.combine import combine_adapters

IDS = tokens(vocabulary=60)
MODES: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}), ("linear", {}), ("svd", {}), ("svd", {"rank": 2}), ("ties", {"density": 0.5}),
    ("ties_svd", {"density": 0.5}), ("magnitude_prune", {"density": 0.4}), ("magnitude_prune_svd", {"density": 0.4}),
    ("ties", {"density": 0.5, "sign": "frequency"}), ("dare_linear", {"density": 0.7}), ("dare_ties", {"density": 0.7}),
    ("dare_linear_svd", {"density": 0.7}), ("dare_ties_svd", {"density": 0.7}),
]  # fmt: skip


def write(folder: Path, seed: int, **fields: Any) -> str:
    torch.manual_seed(seed)
    fields = {"r": 3, "target_modules": ["q_proj", "up_proj", "embed_tokens"], **fields}
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(llama(), config)
    config.base_model_name_or_path = "some/base"
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.mark.parametrize(("mode", "settings"), MODES)
def test_files_alone_give_what_the_model_gives(mode: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", 1), write(tmp_path / "b", 2, lora_alpha=24, use_rslora=True)]
    torch.manual_seed(5)
    found = combine_adapters(folders, tmp_path / "both", [0.7, -0.3], mode, **settings)
    model = PeftModel.from_pretrained(llama(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    names = {"rank": "svd_rank", "density": "density", "sign": "majority_sign_method"}
    torch.manual_seed(5)
    options = {names[k]: v for k, v in settings.items()}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type=mode, **options)
    model.set_adapter("both")
    again = PeftModel.from_pretrained(llama(), tmp_path / "both")
    if "dare" not in mode:  # which entries fall out depends on the order of the layers
        with torch.no_grad():
            torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)
    assert found.layers == 5
    assert again.peft_config["default"].base_model_name_or_path == "some/base"
    assert found.parameters == sum(t.numel() for t in load_peft_weights(tmp_path / "both").values())


def test_one_alone_is_scaled_and_ranks_may_differ(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1)
    b = write(tmp_path / "b", 2, r=5, target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 2})
    combine_adapters([a], tmp_path / "minus", [-1.0])
    ours, theirs = (PeftModel.from_pretrained(llama(), f) for f in (tmp_path / "minus", a))
    for name, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            other = ours.base_model.model.get_submodule(name)
            torch.testing.assert_close(other.get_delta_weight("default"), -layer.get_delta_weight("default"))
    found = combine_adapters([a, b], tmp_path / "sum")
    assert found.ranks == (3, 5)
    with pytest.raises(ExportError, match=rf"same r value .*q_proj|{a}"):
        combine_adapters([a, b], tmp_path / "no", mode="linear")
    assert not (tmp_path / "no").exists()


def test_a_large_layer_is_never_formed(tmp_path: Path) -> None:
    """A delta of this layer would have 40 GB."""
    from safetensors.torch import save_file

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        LoraConfig(r=2, target_modules=["huge"], base_model_name_or_path="x").save_pretrained(folder)
        tensors = {"base_model.model.huge.lora_A.weight": torch.randn(2, 100_000),
                   "base_model.model.huge.lora_B.weight": torch.randn(100_000, 2)}  # fmt: skip
        save_file(tensors, folder / "adapter_model.safetensors")
        folders.append(str(folder))
    found = combine_adapters(folders, tmp_path / "both", mode="svd", rank=3)
    assert found.ranks == (3, 3)


def test_what_the_files_do_not_say_takes_the_base(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", 1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ExportError, match=r"base model is needed \(--model\): base_model.model.lm_head"):
        combine_adapters([whole], tmp_path / "out")
    combine_adapters([whole], tmp_path / "out", base=llama())
    assert any("lm_head" in key for key in load_peft_weights(tmp_path / "out"))
    model = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ExportError, match="base model is needed"):
        combine_adapters([str(tmp_path / "ia3")], tmp_path / "out2")
    dora = write(tmp_path / "dora", 1, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ExportError, match=r"dora.* is made of Dora: here only deltas add up"):
        combine_adapters([dora], tmp_path / "out3")
    with pytest.raises(ExportError, match="is there already"):
        combine_adapters([whole], tmp_path / "out", base=llama())
    for bad, match in (
        ({"adapters": []}, "Name the adapters"),
        ({"adapters": [whole], "weights": [1, 2]}, "one weight, but there are 1 and 2"),
        ({"adapters": [whole], "mode": "mean"}, "no mode 'mean'"),
    ):
        with pytest.raises(ConfigError, match=match):
            combine_adapters(output=tmp_path / "x", **bad)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    run = lambda *args: CliRunner().invoke(app, ["combine", *args])
    done = run(a, b, "--weights", "0.7,0.3", "--mode", "ties", "--density", "0.5", "-o", str(tmp_path / "c"), "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["adapters"] == {a: 0.7, b: 0.3}
    assert (said["mode"], said["ranks"]) == ("ties", [3, 3])
    shown = run(a, "-w", "-1", "-o", str(tmp_path / "d"))
    assert shown.exit_code == 0
    assert "-1 x" in shown.stdout
    for args in ((a, "-w", "x", "-o", str(tmp_path / "e")), (a, "--mode", "mean", "-o", str(tmp_path / "e"))):
        assert run(*args).exit_code == 1
    assert run(a).exit_code == 2
    assert not (tmp_path / "e").exists()
