"""RandLoRA against Σ_i B_i diag(λ_i) A diag(γ_i) in plain loops, and its bases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, RandLoraConfig, get_peft_model

ALL = ["q_proj", "v_proj", "down_proj"]


def test_formula() -> None:
    """The Linear has 12 inputs and 5 outputs: the sum (12, 5) is transposed."""
    r, alpha = 2, 3.0
    model = adapted(RandLoraConfig(target_modules=["linear"], r=r, randlora_alpha=alpha))
    layer, tuner = model.get_base_model().linear, model.base_model
    A, B = (numbers(t["default"]) for t in (tuner.randlora_A, tuner.randlora_B))
    lam, gamma = (numbers(t["default"]) for t in (layer.randlora_lambda, layer.randlora_gamma))
    n = math.ceil(5 / r)
    W = numbers(layer.base_layer.weight)
    for p in range(12):
        row = [B[p][i][c] for i in range(n) for c in range(r)]  # the bases' columns, in order
        for q in range(5):
            total = sum(row[k * n + i] * lam[k][i] * A[k][0][q] * gamma[i][q] for k in range(r) for i in range(n))
            W[q][p] += alpha / r * total
    same(merged(model, "linear"), W)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_the_change_has_full_rank() -> None:
    model = adapted(RandLoraConfig(target_modules=["linear"], r=2, randlora_alpha=3))
    change = merged(model, "linear") - model.get_base_model().linear.base_layer.weight
    assert torch.linalg.matrix_rank(change) == 5


@pytest.mark.parametrize(("fields", "zeros"), [({}, 0.0), ({"sparse": True}, 2 / 3), ({"very_sparse": True}, 0.875)])
def test_bases(fields: dict[str, bool], zeros: float) -> None:
    base = llama(hidden_size=64, intermediate_size=80)
    model = get_peft_model(base, RandLoraConfig(target_modules=ALL, r=5, **fields))
    A, B = model.base_model.randlora_A["default"], model.base_model.randlora_B["default"]
    assert A.shape == (5, 1, 64)
    assert B.shape == (80, 13, 5)
    assert abs(float(B.std()) - 1) < 0.01
    assert abs(float((B == 0).float().mean()) - zeros) < 0.02
    assert not any("randlora_A" in n or "randlora_B" in n for n, p in model.named_parameters())
    assert sum("randlora_B" in n for n in model.state_dict()) == 1, "kept once"


@pytest.mark.parametrize("saved", [True, False])
def test_files_with_and_without_bases(saved: bool, tmp_path: Path) -> None:
    config = RandLoraConfig(target_modules=ALL, r=5, randlora_alpha=5, save_projection=saved, projection_prng_key=3)
    model = adapted(config, llama())
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


def test_a_second_adapter() -> None:
    model = get_peft_model(llama(), RandLoraConfig(target_modules=ALL, r=5))
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same for all adapters"):
        model.add_adapter("b", RandLoraConfig(target_modules=ALL, r=5, projection_prng_key=3))
    with pytest.raises(ValueError, match="must be saved for all adapters or none"):
        model.add_adapter("b", RandLoraConfig(target_modules=ALL, r=5, save_projection=False))
    model.add_adapter("wider", RandLoraConfig(target_modules=["gate_proj"], r=9))
    assert model.base_model.randlora_B["wider"].shape == (24, 2, 9)
