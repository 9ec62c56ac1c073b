"""PVeRA's mean against diag(b) B diag(d) A in plain loops, and what it draws around it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, PveraConfig, get_peft_model

ALL = ["q_proj", "v_proj", "down_proj"]


def test_formula() -> None:
    model = adapted(PveraConfig(target_modules=["linear"], r=3))
    layer, tuner = model.get_base_model().linear, model.base_model
    A, B = (numbers(t["default"]) for t in (tuner.pvera_A, tuner.pvera_B))
    b, d = (numbers(t["default"]) for t in (layer.pvera_lambda_b, layer.pvera_lambda_d))
    W = numbers(layer.base_layer.weight)
    for i, row in enumerate(W):
        for j in range(len(row)):
            row[j] += sum(b[i] * B[i][k] * d[k] * A[k][j] for k in range(3))
    same(merged(model, "linear"), W)
    merging_changes_nothing(model, image())


def test_in_training_the_state_is_drawn_with_the_learned_mean_and_variance() -> None:
    model = adapted(PveraConfig(target_modules=["linear"], r=2))
    layer, tuner = model.get_base_model().linear.train(), model.base_model
    A, B = (t["default"].double() for t in (tuner.pvera_A, tuner.pvera_B))
    b, d = (t["default"].detach() for t in (layer.pvera_lambda_b, layer.pvera_lambda_d))
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    with torch.no_grad():
        y = layer(x.expand(20_000, 12)) - layer.base_layer(x)
    z = torch.linalg.lstsq(b[:, None] * B, y.T).solution.T
    for k in range(2):
        mean = float(d[k] * (A[k] @ x))
        variance = float(torch.exp(d[2 + k] * (A[2 + k] @ x)))
        assert abs(float(z[:, k].mean()) - mean) < 4 * (variance / 20_000) ** 0.5
        assert abs(float(z[:, k].var()) / variance - 1) < 0.05


def test_every_gradient_flows_through_the_draw() -> None:
    model = adapted(PveraConfig(target_modules=["linear"], r=3, sample_at_inference=True))
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)  # the same draw each time
    check_gradients(model, image())


def test_samples_at_inference() -> None:
    plain = adapted(PveraConfig(target_modules=["linear"], r=3))
    assert torch.equal(plain(image()), plain(image()))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = adapted(PveraConfig(target_modules=["linear"], r=3, sample_at_inference=True, generator_seed=4))
        torch.seed()  # only its own seed counts
        runs.append([model(image()), copy.deepcopy(model)(image())])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1]), "every forward has a draw of its own"


@pytest.mark.parametrize("saved", [True, False])
def test_files_with_and_without_projections(saved: bool, tmp_path: Path) -> None:
    model = adapted(PveraConfig(target_modules=ALL, r=5, save_projection=saved, projection_prng_key=3), llama())
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


def test_a_second_adapter() -> None:
    model = get_peft_model(llama(), PveraConfig(target_modules=ALL, r=5))
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same for all adapters"):
        model.add_adapter("b", PveraConfig(target_modules=ALL, r=5, projection_prng_key=3))
    with pytest.raises(ValueError, match="must be saved for all adapters or none"):
        model.add_adapter("b", PveraConfig(target_modules=ALL, r=5, save_projection=False))
