"""TinyLoRA against U √Σ (Σ v_i P_i) √Σ Vᵀ in plain loops, and which layers share a v."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.formulas import add, product
from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, TinyLoraConfig, get_peft_model
from trimtab.files.store import load_peft_weights

ALL = ["q_proj", "v_proj", "down_proj"]


def test_formula() -> None:
    model = adapted(TinyLoraConfig(target_modules=["linear"], r=2, u=4))
    layer = model.get_base_model().linear
    v = numbers(model.base_model.tinylora_v["default"].get_parameter("0"))
    A, B, P = (numbers(getattr(layer, f"tinylora_{name}")["default"]) for name in "ABP")
    R = [[sum(v[k] * P[k][i][j] for k in range(4)) for j in range(2)] for i in range(2)]
    same(merged(model, "linear"), add(numbers(layer.base_layer.weight), product(B, product(R, A))))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_the_fixed_factors_are_the_leading_singular_triplets() -> None:
    model = adapted(TinyLoraConfig(target_modules=["linear"], r=2))
    layer = model.get_base_model().linear
    A, B = layer.tinylora_A["default"], layer.tinylora_B["default"]
    values = torch.linalg.svdvals(layer.base_layer.weight)
    same(A @ A.T, torch.diag(values[:2]))
    same(B.T @ B, torch.diag(values[:2]))
    same((layer.base_layer.weight - B @ A).norm() ** 2, (values[2:] ** 2).sum())


@pytest.mark.parametrize(("tying", "count"), [(0.0, 6), (0.5, 3), (0.6, 2), (0.95, 1), (1.0, 1)])
def test_neighbouring_layers_share(tying: float, count: int, tmp_path: Path) -> None:
    model = adapted(TinyLoraConfig(target_modules=ALL, u=3, weight_tying=tying), llama())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * count
    model.save_pretrained(tmp_path)
    assert sum("tinylora_v" in key for key in load_peft_weights(tmp_path)) == count
    x = tokens(vocabulary=64)
    assert torch.equal(PeftModel.from_pretrained(llama().double(), tmp_path)(x).logits, model(x).logits)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_files_with_and_without_projections(saved: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(TinyLoraConfig(target_modules=ALL, save_projection=saved, projection_seed=3), llama())
    model.save_pretrained(tmp_path)
    assert any("tinylora_P" in key for key in load_peft_weights(tmp_path)) == saved
    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage and saved)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


def test_what_cannot_be() -> None:
    for fields, fault in (
        ({"weight_tying": 2.0}, "between 0.0 and 1.0"),
        ({"u": 0}, "`u`"),
        ({"init_weights": "x"}, "x"),
    ):
        with pytest.raises(ValueError, match=fault):
            TinyLoraConfig(**fields)
    model = get_peft_model(llama(), TinyLoraConfig(target_modules=ALL))
    with pytest.raises(ValueError, match="saved for all adapters or none"):
        model.add_adapter("b", TinyLoraConfig(target_modules=ALL, save_projection=False))
