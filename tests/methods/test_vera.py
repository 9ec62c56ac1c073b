"""VeRA against diag(b) B diag(d) A in plain loops, and its projections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, VeraConfig, get_peft_model

ALL = ["q_proj", "v_proj", "down_proj"]


def test_formula() -> None:
    model = adapted(VeraConfig(target_modules=["linear"], r=3))
    layer, tuner = model.get_base_model().linear, model.base_model
    A, B = (numbers(t["default"]) for t in (tuner.vera_A, tuner.vera_B))
    b, d = (numbers(t["default"]) for t in (layer.vera_lambda_b, layer.vera_lambda_d))
    W = numbers(layer.base_layer.weight)
    for i, row in enumerate(W):
        for j in range(len(row)):
            row[j] += sum(b[i] * B[i][k] * d[k] * A[k][j] for k in range(3))
    same(merged(model, "linear"), W)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_projections_are_kept_once_and_never_trained() -> None:
    model = get_peft_model(llama(), VeraConfig(target_modules=ALL, r=5))
    assert model.base_model.vera_A["default"].shape == (5, 24)  # down_proj's input is the widest
    assert model.base_model.vera_B["default"].shape == (16, 5)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".vera_lambda_" in n for n in trained)
    assert sum("vera_A" in n for n in model.state_dict()) == 1


def test_two_vectors_of_two_layers_with_other_sizes() -> None:
    model = adapted(VeraConfig(target_modules=ALL, r=5), llama())
    x = tokens(vocabulary=64)
    y = model(x).logits
    model.merge_adapter()
    same(model(x).logits, y)


@pytest.mark.parametrize("saved", [True, False])
def test_files_with_and_without_projections(saved: bool, tmp_path: Path) -> None:
    model = adapted(VeraConfig(target_modules=ALL, r=5, save_projection=saved, projection_prng_key=3), llama())
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


def test_a_second_adapter() -> None:
    model = get_peft_model(llama(), VeraConfig(target_modules=ALL, r=5))
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same for all adapters"):
        model.add_adapter("b", VeraConfig(target_modules=ALL, r=5, projection_prng_key=3))
    with pytest.raises(ValueError, match="must be saved for all adapters or none"):
        model.add_adapter("b", VeraConfig(target_modules=ALL, r=5, save_projection=False))
    model.add_adapter("wider", VeraConfig(target_modules=["gate_proj"], r=9))
    assert model.base_model.vera_B["wider"].shape == (24, 9)
    model.delete_adapter("wider")
    assert list(model.base_model.vera_B) == ["default"]
