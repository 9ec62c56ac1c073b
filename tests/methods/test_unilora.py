"""Uni-LoRA's pairs as a sparse P times θ in plain loops, and what P promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.formulas import add, product
from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, UniLoraConfig, get_peft_model
from trimtab.files.store import load_peft_weights

ALL = ["q_proj", "v_proj", "down_proj"]


def columns(model: PeftModel) -> list[tuple[int, float]]:
    """(column, value) of the entry in each row of P, layer by layer, A before B."""
    found: list[tuple[int, float]] = []
    for layer in (m for m in model.modules() if "unilora_scales_A" in m._modules):
        for name in "AB":
            which, scale = (getattr(layer, f"unilora_{part}_{name}")["default"] for part in ("indices", "scales"))
            found += zip(which.flatten().tolist(), scale.flatten().tolist(), strict=True)
    return found


def test_formula() -> None:
    model = adapted(UniLoraConfig(target_modules=["linear"], r=3, theta_d_length=7))
    layer = model.get_base_model().linear
    theta = numbers(model.base_model.unilora_theta_d["default"])
    rows = [theta[column] * value for column, value in columns(model)]  # P θ
    A = [rows[12 * k : 12 * k + 12] for k in range(3)]
    B = [rows[36 + 3 * i : 36 + 3 * i + 3] for i in range(5)]
    same(merged(model, "linear"), add(numbers(layer.base_layer.weight), product(B, A)))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("d", [5, 100, 10_000])
def test_p_is_balanced_and_an_isometry(d: int) -> None:
    model = get_peft_model(llama(), UniLoraConfig(target_modules=ALL, r=2, theta_d_length=d))
    P = torch.zeros(len(columns(model)), d, dtype=torch.float64)
    for row, (column, value) in enumerate(columns(model)):
        P[row, column] = value
    counts = (P != 0).sum(0)
    assert counts.max() - counts.min() <= 1
    used = counts > 0
    same(P[:, used].T @ P[:, used], torch.eye(int(used.sum())), 1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.unilora_theta_d.default"]


@pytest.mark.parametrize("kept", [False, True])
def test_files_with_and_without_p(kept: bool, tmp_path: Path) -> None:
    model = adapted(UniLoraConfig(target_modules=ALL, r=2, save_indices=kept, proj_seed=3), llama())
    model.save_pretrained(tmp_path)
    keys = load_peft_weights(tmp_path).keys()
    assert len(keys) == (1 + 4 * 6 if kept else 1)
    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


def test_sizes() -> None:
    with pytest.raises(ValueError, match="`theta_d_length` should be a positive integer value"):
        UniLoraConfig(theta_d_length=0)
    model = get_peft_model(llama(), UniLoraConfig(target_modules=ALL, theta_d_length=9))
    model.add_adapter("b", UniLoraConfig(target_modules=["q_proj"], theta_d_length=4, proj_seed=2))
    assert model.base_model.unilora_theta_d["b"].shape == (4,)
