"""Dropout's masks: the same for a row wherever it is met, and as random as a mask has to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.dropout import Dropout, Rows, mixed, rows_of

WIDTH = 48


def mask(rows: list[tuple[int, int, int]], tokens: int, p: float = 0.2, seed: int = 1, width: int = WIDTH) -> Tensor:
    """Which places (tokens, width) are kept."""
    kept = torch.ones(tokens * width, dtype=torch.bool)
    kept[Dropout(p, seed, Rows.of(rows)).dropped(width)] = False
    return kept.view(tokens, width)


def test_a_row_has_its_mask_wherever_it_is() -> None:
    """Alone, in a batch, in another order, packed behind others, padded at its end, or cut short."""
    alone = mask([(77, 0, 150)], 150)
    batch = mask([(5, 0, 90), (77, 90, 150), (6, 240, 1)], 241)
    assert torch.equal(batch[90:240], alone)
    assert torch.equal(mask([(77, 10, 150)], 300)[10:160], alone)
    assert torch.equal(mask([(77, 0, 70)], 70), alone[:70])
    assert torch.equal(mask([(77, 0, 1)], 1), alone[:1])


def test_tokens_of_no_row_are_kept() -> None:
    found = mask([(1, 3, 5), (2, 12, 4)], 20)
    outside = torch.ones(20, dtype=torch.bool)
    outside[3:8] = outside[12:16] = False
    assert found[outside].all()
    assert not found[~outside].all()


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("width", [1, 3, 48, 576])
def test_as_many_are_dropped_as_asked(p: float, width: int) -> None:
    """Within 5 standard deviations, whatever the shape; over many small rows as in one long."""
    tokens = 40_000 // width
    for rows in ([(9, 0, tokens)], [(i, 4 * i, 4) for i in range(tokens // 4)]):
        n = sum(r[2] for r in rows) * width
        dropped = n - int(mask(rows, tokens, p, width=width).view(-1)[:n].sum())
        assert abs(dropped - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_none_and_all() -> None:
    x = torch.randn(6, WIDTH)
    assert not Dropout(1.0, 1, rows_of(x))(x).any()
    assert len(Dropout(0.5, 1, Rows.of([])).dropped(WIDTH)) == 0


def test_what_is_left_is_scaled_up() -> None:
    x = torch.randn(6, 5, WIDTH)
    y = Dropout(0.2, 1, rows_of(x))(x)
    assert torch.allclose(y[y != 0], x[y != 0] / 0.8)


def test_every_place_is_dropped_alike() -> None:
    """Each place of a row over many rows: no place is favoured (chi-square within 5 sigma of its mean)."""
    rows, p = 4000, 0.1
    kept = mask([(i, 3 * i, 3) for i in range(rows)], 3 * rows, p).view(rows, -1)
    counts = (~kept).sum(0).double()
    chi = ((counts - rows * p) ** 2 / (rows * p * (1 - p))).sum()
    n = kept.shape[1]
    assert abs(chi - n) < 5 * (2 * n) ** 0.5


def test_masks_of_other_seeds_rows_and_blocks_are_independent() -> None:
    """Pairs drop the same place as often as chance has it: neighbouring seeds, keys, blocks and places."""
    p, n = 0.3, 64 * 500
    long = mask([(1, 0, 64 * 4)], 64 * 4, p, width=500)
    pairs = [
        (mask([(1, 0, 64)], 64, p, s, 500), mask([(1, 0, 64)], 64, p, s + 1, 500)) for s in (0, 1, 2**31 - 1, 2**32 - 2)
    ]
    pairs += [(mask([(k, 0, 64)], 64, p, 1, 500), mask([(k + 1, 0, 64)], 64, p, 1, 500)) for k in (0, 7, 2**40)]
    pairs += [
        (long[:64], long[64:128]),
        (long[64:128], long[128:192]),
        (long[:64], long[1:65]),
        (long[:64, :-1], long[:64, 1:]),
    ]
    for a, b in pairs:
        both = (~a & ~b).double().mean()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5


def test_keys_of_several_numbers() -> None:
    found = {mixed(mixed(a, b), c) for a in range(10) for b in range(10) for c in range(10)}
    assert len({k & 0xFFFFFFFF for k in found}) == 1000
    assert mixed(1, 2) != mixed(2, 1)


def test_rows_of_an_input() -> None:
    """A batch, a packed sequence, single vectors: rows of one name have one mask; what does not add up raises."""
    x = torch.randn(3, 70, WIDTH)
    batch = Dropout(0.3, 5, rows_of(x, keys=(8, 2, 9))).kept(x)
    packed = Dropout(0.3, 5, rows_of(x[:1, :33], keys=(2, 8), lengths=(30, 3))).kept(x[:1, :33])
    assert torch.equal(packed[0], torch.cat([batch[1, :30], batch[0, :3]]))
    vectors = Dropout(0.3, 5, rows_of(x[:, 0], keys=(8, 2, 9))).kept(x[:, 0])
    assert torch.equal(vectors, batch[:, 0])
    assert torch.equal(Dropout(0.3, 5, rows_of(x[0, 0], keys=(8,))).kept(x[0, 0]), batch[0, 0])
    deep = x.view(3, 7, 10, WIDTH)
    assert torch.equal(Dropout(0.3, 5, rows_of(deep, keys=(8, 2, 9))).kept(deep), batch.view(deep.shape))
    with pytest.raises(ValueError, match="33 vectors, but the input has 34"):
        rows_of(x[:1, :34], lengths=(30, 3))
