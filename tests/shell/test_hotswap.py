"""Another LoRA in the place of a loaded one: in place where it can be, loaded anew where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from tests.models import tokens, toy
from trimtab import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from trimtab.errors import AdapterFileError, AdapterNameError, ConfigError

IDS = tokens()


def made(targets: list[str], r: int = 2, seed: int = 5, **fields: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(toy(), LoraConfig(r=r, target_modules=targets, init_lora_weights=False, **fields)).eval()


NEW: dict[str, tuple[list[str], dict[str, Any]]] = {
    "other numbers": (["up"], {}),
    "another rank": (["up"], {"r": 5, "lora_alpha": 3}),
    "more layers": (["up", "head", "embed"], {"r": 3}),
    "other layers": (["head", "conv"], {}),
    "DoRA": (["up"], {"use_dora": True}),
    "another kind of scale": (["up"], {"use_rslora": True, "alpha_pattern": {"up": 7}}),
    "a layer that is trained whole": (["up"], {"modules_to_save": ["head"]}),
}


@pytest.mark.parametrize("name", NEW)
def test_the_new_one_acts_under_the_old_name(name: str, tmp_path: Path) -> None:
    targets, fields = NEW[name]
    model, other = made(["up"]), made(targets, seed=6, **fields)
    other.save_pretrained(tmp_path)
    model.add_adapter("beside", LoraConfig(r=2, target_modules=["down"], init_lora_weights=False))
    model.set_adapter("beside")
    beside = model(IDS)
    model.set_adapter("default")
    held = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path, "default")
    assert model.peft_config.keys() == {"default", "beside"}
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    now = dict(model.named_parameters())
    if name in ("other numbers", "another rank"):
        assert all(now[n] is p for n, p in held.items())
    trained = {n for n, p in now.items() if p.requires_grad}
    assert trained == {n for n, p in other.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = PeftModel.from_pretrained(toy(), tmp_path / "again")
    torch.testing.assert_close(again(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    model.set_adapter("beside")
    torch.testing.assert_close(model(IDS), beside)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), toy().eval()(IDS))


def test_one_that_is_not_active_stays_so(tmp_path: Path) -> None:
    model, other = made(["up"]), made(["head"], seed=6)
    other.save_pretrained(tmp_path)
    model.add_adapter("beside", LoraConfig(r=2, target_modules=["down"], init_lora_weights=False))
    model.set_adapter("beside")
    before = model(IDS)
    hotswap_adapter(model, tmp_path, "default")
    assert model.active_adapters == ["beside"]
    assert torch.equal(model(IDS), before)


def test_a_compiled_model_is_compiled_once_more_for_a_larger_rank(tmp_path: Path) -> None:
    model, other = made(["up"]), made(["up"], r=6, seed=6)
    other.save_pretrained(tmp_path)
    counter = CompileCounter()
    runs = torch.compile(model, backend=counter)
    runs(IDS)
    frames = counter.frame_count
    hotswap_adapter(runs, tmp_path, "default")
    for _ in range(2):
        torch.testing.assert_close(runs(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    assert frames < counter.frame_count <= 2 * frames


def test_what_cannot_be_taken_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = made(["up", "head"])
    before, held = model(IDS), {n: p.clone() for n, p in model.named_parameters()}
    get_peft_model(toy(), IA3Config(target_modules=["up"], feedforward_modules=["up"])).save_pretrained(
        tmp_path / "ia3"
    )
    made(["up"]).save_pretrained(tmp_path / "wide")
    made(["up", "conv"]).save_pretrained(tmp_path / "nan")
    made(["up"]).save_pretrained(tmp_path / "inf")
    for folder, change in {
        "wide": lambda key, t: t.repeat(1, 2) if "lora_A" in key else t,
        "nan": lambda key, t: t * float("nan"),
        "inf": lambda key, t: t * float("inf"),
    }.items():
        file = tmp_path / folder / "adapter_model.safetensors"
        save_file({k: change(k, t).contiguous() for k, t in load_file(file).items()}, file)
    with pytest.raises(AdapterNameError, match="nobody"):
        hotswap_adapter(model, tmp_path / "wide", "nobody")
    with pytest.raises(ConfigError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap_adapter(model, tmp_path / "ia3", "default")
    with pytest.raises(AdapterFileError, match=r"does not fit the model's layers: .*lora_A"):
        hotswap_adapter(model, tmp_path / "wide", "default")
    for folder in ("nan", "inf"):
        with pytest.raises(AdapterFileError, match=folder):
            hotswap_adapter(model, tmp_path / folder, "default")
    with pytest.raises(AdapterFileError, match="none"):
        hotswap_adapter(model, tmp_path / "none", "default")
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(p, held[n]) for n, p in model.named_parameters())
    assert list(model.peft_config) == ["default"]
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, tmp_path / "wide", "default")


def test_tokens_that_are_trained_beside_a_lora_are_padded_along_with_it() -> None:
    """Two methods at one layer: each keeps its own place in the adapter's layout, also once it is parked and back."""
    model = made(["embed", "up"], trainable_token_indices={"embed": [1, 2]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
        y = model(IDS)
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        torch.testing.assert_close(model(IDS), y)
        for n in range(10):  # the first one leaves the module tree
            model.add_adapter(f"other{n}", LoraConfig(r=2, target_modules=["up"]))
            model.set_adapter(f"other{n}")
        model.set_adapter("default")
        torch.testing.assert_close(model(IDS), y)
