"""OFT against Cayley's transform in plain loops, at every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import toy
from trimtab import OFTConfig, get_peft_model
from trimtab.core.method import Call
from trimtab.methods.oft import nearest_divisor


def inverse(M: list) -> list:
    """M⁻¹ by Gauss and Jordan."""
    n = len(M)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(M)]
    for i in range(n):
        p = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[p] = rows[p], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for k in range(n):
            if k != i:
                rows[k] = [a - rows[k][i] * b for a, b in zip(rows[k], rows[i])]
    return [row[n:] for row in rows]


def times(A: list, B: list) -> list:
    return [[sum(a * B[k][j] for k, a in enumerate(row)) for j in range(len(B[0]))] for row in A]


def rotation(v: list, b: int, terms: int = 0) -> list:
    """(I - Q)(I + Q)⁻¹, or with `terms` I + 2 Q + 2 Q² + ... + Qᵗ, from the entries above Q's diagonal."""
    entries, Q = iter(v), [[0.0] * b for _ in range(b)]
    for i in range(b):
        for j in range(i + 1, b):
            Q[i][j] = next(entries)
            Q[j][i] = -Q[i][j]
    eye = [[float(i == j) for j in range(b)] for i in range(b)]
    if not terms:
        minus, plus = ([[e + s * q for e, q in zip(*rows)] for rows in zip(eye, Q)] for s in (-1, 1))
        return times(minus, inverse(plus))
    R, power = eye, eye
    for k in range(1, terms + 1):
        power = times(power, Q)
        R = [[r + (1 if k == terms else 2) * q for r, q in zip(*rows)] for rows in zip(R, power)]
    return R


def rotated(W: list, v: list, b: int, terms: int = 0) -> list:
    """W Rᵀ, block by block; the last block serves all that have none."""
    out = [list(row) for row in W]
    for n in range(len(W[0]) // b):
        R = rotation(v[min(n, len(v) - 1)], b, terms)
        for row, new in zip(W, out):
            for i in range(b):
                new[n * b + i] = sum(row[n * b + j] * R[i][j] for j in range(b))
    return out


@pytest.mark.parametrize(
    ("options", "b", "terms"),
    [
        ({"oft_block_size": 4, "use_cayley_neumann": False}, 4, 0),
        ({"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}, 6, 0),
        ({"oft_block_size": 4}, 4, 4),
        ({"oft_block_size": 3, "num_cayley_neumann_terms": 7, "block_share": True}, 3, 6),
        ({"oft_block_size": 3, "num_cayley_neumann_terms": 3}, 3, 3),
    ],
)
def test_linear(options: dict[str, Any], b: int, terms: int) -> None:
    model = adapted(OFTConfig(target_modules=["linear"], **options))
    layer = model.get_base_model().linear
    v = numbers(layer.oft_R["default"].weight)
    same(merged(model, "linear"), rotated(numbers(layer.base_layer.weight), v, b, terms))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("name", ["conv", "point"])
def test_convolution_is_the_rotated_kernel(name: str) -> None:
    """Where PEFT, which rotates pixels that it has not cut into patches, is off by 5 before any training."""
    base = Net().double()
    expected = base(image())
    same(get_peft_model(base, OFTConfig(target_modules=[name], oft_block_size=2))(image()), expected)
    model = adapted(OFTConfig(target_modules=[name], oft_block_size=2, use_cayley_neumann=False))
    layer = model.get_base_model().get_submodule(name)
    W, v = layer.base_layer.weight, numbers(layer.oft_R["default"].weight)
    same(merged(model, name).flatten(1), rotated(numbers(W.flatten(1)), v, 2))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_grouped_convolution_runs_but_has_no_grouped_weight() -> None:
    model = adapted(OFTConfig(target_modules=["grouped"], oft_block_size=9))
    check_gradients(model, image())
    expected = get_peft_model(Net().double(), OFTConfig(target_modules=["grouped"], oft_block_size=9))(image())
    same(expected, Net().double()(image()))


def test_exact_blocks_are_rotations() -> None:
    config = OFTConfig(target_modules=["linear"], oft_block_size=4, use_cayley_neumann=False)
    layer = adapted(config).get_base_model().linear
    (method,) = layer.methods["default"]
    R = method.rotation(torch.zeros(1, dtype=torch.float64))
    same(R @ R.mT, torch.eye(4, dtype=torch.float64).expand_as(R))
    same(torch.linalg.det(R), torch.ones(3, dtype=torch.float64))


def test_stacked() -> None:
    """Two at once: forward and merged agree (in PEFT they differ by 1.7)."""
    model = adapted(OFTConfig(target_modules=["linear"], oft_block_size=4))
    model.add_adapter("b", OFTConfig(target_modules=["linear"], oft_block_size=6, init_weights=False))
    model.set_adapter(["default", "b"])
    y = model(image())
    model.merge_adapter(["default", "b"])
    same(model(image()), y)


def test_constrained_q_stays_in_its_ball() -> None:
    model = adapted(OFTConfig(target_modules=["linear"], oft_block_size=4, coft=True, eps=0.1))
    v = model.get_base_model().linear.oft_R["default"].weight
    held, y = v.detach().clone(), model(image())
    assert torch.equal(v, held), "evaluation changes nothing"
    model.train()
    model(image()).sum().backward()
    same(2**0.5 * v.norm(dim=1), torch.full((3,), 0.1 / 3**0.5, dtype=torch.float64))
    assert v.grad.abs().max() > 0
    same(model.eval()(image()), y)


def test_module_dropout_puts_identities_in_place_of_blocks() -> None:
    config = OFTConfig(target_modules=["linear"], oft_block_size=2, module_dropout=0.5)
    layer = adapted(config).train().get_base_model().linear
    (method,) = layer.methods["default"]
    x, eye = torch.zeros(1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    share = torch.stack([(method.rotation(x, Call()) == eye).all(-1).all(-1).double().mean() for _ in range(60)])
    assert 0.35 < float(share.mean()) < 0.65
    assert not (method.rotation(x) == eye).all(-1).all(-1).any()


def test_sizes_that_do_not_divide_are_adjusted() -> None:
    for size, given, fits in ((24, 5, 4), (24, 7, 6), (24, 10, 8), (24, 48, 24), (7, 4, 1), (24, 8, 8)):
        assert nearest_divisor(size, given) == fits


def test_errors_and_warnings() -> None:
    for options, message in (
        ({"r": 4}, "You can only specify either r"),
        ({"oft_block_size": 0}, "Either `r` or `oft_block_size` must be"),
        ({"oft_block_size": -1}, "Either `r` or `oft_block_size` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(toy(), OFTConfig(target_modules=["up"], **options))
    with pytest.warns(UserWarning, match=r"Invalid `oft_block_size` \(4\)! Adjusted `oft_block_size` to \(3\)"):
        get_peft_model(toy(), OFTConfig(target_modules=["up"], oft_block_size=4))
