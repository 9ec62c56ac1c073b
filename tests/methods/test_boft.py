"""BOFT against permuted blocks in plain loops, and its fused spelling against its merged weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.methods.test_oft import inverse, times
from tests.models import toy
from trimtab import BOFTConfig, get_peft_model
from trimtab.core.method import Call


def factor(blocks: list, half: int, k: int) -> list:
    """F (in, in): block n acts on the inputs whose half blocks are n's pair, 2^k half blocks apart."""
    b = len(blocks[0])
    size = len(blocks) * b
    pairs = [h for h in range(size // half) if not h & (1 << k)] if half else range(len(blocks))
    F = [[0.0] * size for _ in range(size)]
    for A, first in zip(blocks, pairs):
        places = [h * half + i for h in (first, first + (1 << k)) for i in range(half)] if half else [
            first * b + i for i in range(b)]  # fmt: skip
        Q = [[(A[i][j] - A[j][i]) / 2 for j in range(b)] for i in range(b)]
        plus, minus = ([[float(i == j) + s * Q[i][j] for j in range(b)] for i in range(b)] for s in (1, -1))
        R = times(plus, inverse(minus))
        for i in range(b):
            for j in range(b):
                F[places[i]][places[j]] = R[i][j]
    return F


@pytest.mark.parametrize(("b", "m"), [(4, 1), (3, 1), (2, 2), (6, 2), (12, 1)])
def test_linear(b: int, m: int) -> None:
    model = adapted(BOFTConfig(target_modules=["linear"], boft_block_size=b, boft_n_butterfly_factor=m))
    layer = model.get_base_model().linear
    W = numbers(layer.base_layer.weight)
    for k, blocks in enumerate(numbers(layer.boft_R["default"])):
        W = times(W, factor(blocks, b // 2 if m > 1 else 0, k))
    s = numbers(layer.boft_s["default"])
    same(merged(model, "linear"), [[v * s[i][0] for v in row] for i, row in enumerate(W)])
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("name", ["conv", "point"])
def test_convolution_is_the_rotated_kernel(name: str) -> None:
    model = adapted(BOFTConfig(target_modules=[name], boft_block_size=2))
    layer = model.get_base_model().get_submodule(name)
    W, s = numbers(layer.base_layer.weight.flatten(1)), numbers(layer.boft_s["default"])
    W = times(W, factor(numbers(layer.boft_R["default"])[0], 0, 0))
    same(merged(model, name).flatten(1), [[v * s[0][i] for v in row] for i, row in enumerate(W)])
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_stacked_with_one_that_changes_the_bias() -> None:
    model = adapted(BOFTConfig(target_modules=["linear"], boft_n_butterfly_factor=1))
    model.add_adapter("second", BOFTConfig(target_modules=["linear"], boft_block_size=6, init_weights=False))
    model.set_adapter(["default", "second"])
    y = model(image())
    model.merge_adapter(["default", "second"])
    same(model(image()), y)


def test_dropout_puts_identities_in_place_of_blocks() -> None:
    config = BOFTConfig(target_modules=["linear"], boft_block_size=2, boft_dropout=0.5)
    layer = adapted(config).train().get_base_model().linear
    (method,) = layer.methods["default"]
    x, eye = torch.zeros(1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    share = torch.stack([(method.blocks(x, Call()) == eye).all(-1).all(-1).double().mean() for _ in range(60)])
    assert 0.35 < float(share.mean()) < 0.65
    assert not (method.blocks(x) == eye).all(-1).all(-1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_num": 2}, "You can only specify either boft_block_size"),
        ({"boft_block_size": 0}, "Either `boft_block_size` or `boft_block_num` must be non-zero"),
        ({"boft_n_butterfly_factor": 0}, "positive integer number"),
        ({"boft_block_size": 5}, "must be divisible by boft_block_size"),
        ({"boft_block_size": 0, "boft_block_num": 5}, "must be divisible by boft_block_num"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "must be an even number"),
        ({"boft_block_size": 2, "boft_n_butterfly_factor": 3}, "Invalid combination of in_features"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(toy(), BOFTConfig(target_modules=["up"], **options))
