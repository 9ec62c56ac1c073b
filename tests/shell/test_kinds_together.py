"""Adapters of several methods on one model: saved and loaded, stacked, in one batch. PEFT cannot save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.cases import move
from tests.models import llama
from trimtab import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "a": LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "b": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "c": LoHaConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "d": OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "e": VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
}
IDS = torch.tensor([[4, 9, 11, 7, 3, 2]]).expand(6, -1).contiguous()


def base() -> Any:
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def several(names: str = "abcde") -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base(), CONFIGS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    for name in names:
        move(model, name)
    return model.eval()


def outputs(model: Any, names: str = "abcde") -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = model(IDS[:1]).logits
    return found


def test_each_is_saved_and_loaded(tmp_path: Path) -> None:
    model = several()
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "c", adapter_name="c")  # in another order
    for name in "eabd":
        loaded.load_adapter(tmp_path / name, name)
    found = outputs(loaded)
    plain = base()(IDS[:1]).logits
    for name, out in wanted.items():
        torch.testing.assert_close(found[name], out)
        assert (out - plain).abs().max() > 1e-3
        alone = PeftModel.from_pretrained(base(), tmp_path / name)
        torch.testing.assert_close(alone(IDS[:1]).logits, out)


def test_one_mixed_batch_of_them() -> None:
    model = several()
    wanted = {**outputs(model), "__base__": base()(IDS[:1]).logits}
    rows = ["c", "a", "__base__", "b", "e", "d"]
    mixed = model(IDS, adapter_names=rows).logits
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row : row + 1], wanted[name], rtol=1e-4, atol=1e-4)
    said = model.generate(IDS, adapter_names=rows, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for row, name in enumerate(rows):
        with model.disable_adapter() if name == "__base__" else _using(model, name):
            assert torch.equal(
                model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)[0], said[row]
            )


def _using(model: Any, name: str) -> Any:
    import contextlib

    model.set_adapter(name)
    return contextlib.nullcontext()


@pytest.mark.parametrize("names", ["abc", "cba", "adb", "ec"])
def test_stacked_they_are_what_is_merged(names: str) -> None:
    model = several(names)
    model.base_model.set_adapter(list(names))
    out = model(IDS[:1]).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS[:1]).logits, out, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(IDS[:1]).logits, out)


def test_each_trains_beside_the_others() -> None:
    """Its gradients are those it has alone."""
    for name in "abc":
        both, alone = several(), several(name)
        both.set_adapter(name)
        held = dict(both.named_parameters())
        with torch.no_grad():
            for key, parameter in alone.named_parameters():
                parameter.copy_(held.get(key, parameter))
        grads = []
        for model in (both, alone):
            model(IDS, labels=IDS).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[1].items():
            torch.testing.assert_close(grads[0][key], grad)


def test_a_prompt_among_them(tmp_path: Path) -> None:
    model = several("ab")
    model.add_adapter("p", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "p", adapter_name="p")
    loaded.load_adapter(tmp_path / "b", "b")
    for name in ("p", "b"):
        for m in (model, loaded):
            m.set_adapter(name)
        torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(ValueError, match="no row of `adapter_names` can have one"):
        loaded(IDS[:2], adapter_names=["b", "p"])
