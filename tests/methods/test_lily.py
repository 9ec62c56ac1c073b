"""Lily's mixed pair in plain loops, and which layers share which tensors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tests.methods.formulas import linear, product, transposed
from tests.methods.nets import adapted, check_gradients, image, numbers, same
from tests.models import llama, tokens
from trimtab import LilyConfig, PeftModel, get_peft_model

ALL = ["q_proj", "v_proj", "down_proj"]


def test_formula() -> None:
    r, s = 3, 1.5
    model = adapted(LilyConfig(target_modules=["linear"], r=r, num_B=2, scaling=s))
    layer = model.get_base_model().linear
    A, B, R = (numbers(getattr(layer, f"lily_{name}")["default"].weight) for name in ("A", "B", "router"))
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    X = numbers(x)
    H = product(X, transposed(A))
    w = [0.0, 0.0]
    for h in H:
        powers = [math.exp(sum(R[e][k] * h[k] for k in range(r))) for e in range(2)]
        w = [w[e] + powers[e] / sum(powers) / len(H) for e in range(2)]
    mixed = [[sum(w[e] * B[e * r + k][j] for e in range(2)) for j in range(5)] for k in range(r)]
    Y = linear(numbers(layer.base_layer.weight), numbers(layer.base_layer.bias), X)
    update = product(H, mixed)
    same(layer(x), [[a + s * b for a, b in zip(y, u, strict=True)] for y, u in zip(Y, update, strict=True)])
    check_gradients(model, image())


def kept(model: PeftModel, leaf: str) -> list[list[str]]:
    """The layers that share each tensor of a leaf."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if f"lily_{leaf}.default" in name:
            found.setdefault(id(p), []).append(name.partition("layers.")[2].partition(".lily")[0])
    return list(found.values())


@pytest.mark.parametrize(
    "how", ["built", "moved", "copied", "parked", "parked as data", "loaded", "loaded without memory"]
)
def test_layers_share_tensors_and_keep_doing_so(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LilyConfig(target_modules=["q_proj", "down_proj"], r=3, stride_A=2, init_weights=False)
    model = get_peft_model(llama(num_hidden_layers=3), config)
    x = tokens(vocabulary=64)
    if how == "moved":
        model.double()
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how.startswith("parked"):
        if "data" in how:
            monkeypatch.setattr("trimtab.graft.residents.ASIDE", 0)
        for i in range(12):
            model.add_adapter(f"other{i}", config)
            model.set_adapter(f"other{i}")
        model.set_adapter("default")
    elif how.startswith("loaded"):
        model.save_pretrained(tmp_path)
        expected = model(x).logits
        less = "memory" in how
        model = PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path, low_cpu_mem_usage=less)
        assert torch.equal(model(x).logits, expected)
    q, down = ([f"{i}.{name}" for i in range(3)] for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert sorted(kept(model, "A")) == sorted([q[:2], q[2:], down[:2], down[2:]])
    assert sorted(kept(model, "B")) == sorted([q, down])
    assert len(kept(model, "router")) == 6


def test_what_cannot_be() -> None:
    for fields, fault in (({"num_B": 1}, "`num_B`"), ({"stride_A": 0}, "`stride_A`"), ({"r": 0}, "`r`")):
        with pytest.raises(ValueError, match=fault):
            LilyConfig(**fields)
