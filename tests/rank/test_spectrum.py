"""Spectra from factors against the SVD of the full matrix; effective ranks against their definitions in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import ConfigError
from trimtab.rank.spectrum import delta_spectrum, effective_ranks, energy_rank, significant, svd_of_product


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from([(), (1,), (3,)]), st.floats(-4, 4), st.integers(0, 10**6))
def test_of_factors_is_that_of_the_product(sizes, batch, scale, seed) -> None:
    """Also with a rank above both dimensions."""
    out, r, into = sizes
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(*batch, r, into, generator=draw), torch.randn(*batch, out, r, generator=draw)
    D = scale * (B.double() @ A.double())
    found, wanted = delta_spectrum(A, B, scale), torch.linalg.svdvals(D)
    k = min(out, r, into)
    assert found.shape == (*batch, k)
    assert torch.allclose(found, wanted[..., :k], atol=1e-12)
    assert torch.allclose(wanted[..., k:], torch.zeros(1).double(), atol=1e-12)
    U, S, Vh = svd_of_product(A, B)
    assert torch.allclose(scale * (U * S[..., None, :]) @ Vh, D, atol=1e-12)
    assert torch.allclose(U.mT @ U, torch.eye(k).double(), atol=1e-10)


def test_half_precision_loses_nothing_further() -> None:
    A, B = torch.randn(3, 8).bfloat16(), torch.randn(6, 3).bfloat16()
    assert torch.allclose(delta_spectrum(A, B), torch.linalg.svdvals(B.double() @ A.double())[:3], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.05, 1.0))
def test_measures_follow_their_definitions(values, share) -> None:
    values = sorted(values, reverse=True)
    found = effective_ranks(torch.tensor(values, dtype=torch.float64))
    energy = sum(v * v for v in values)
    p = [v / sum(values) for v in values]
    assert found.entropy == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert found.stable == pytest.approx(energy / values[0] ** 2)
    assert 1 <= found.stable <= len(values) + 1e-9
    assert 1 - 1e-9 <= found.entropy <= len(values) + 1e-9
    n = energy_rank(torch.tensor(values).double().square(), share)
    held = [sum(v * v for v in values[:k]) / energy for k in range(len(values) + 1)]
    assert held[n] >= share - 1e-9
    assert held[n - 1] < share + 1e-9


def test_equal_values_count_alike_in_every_measure() -> None:
    found = effective_ranks(torch.full((10,), 2.5))
    assert (found.energy90, found.energy99) == (9, 10)
    assert found.entropy == pytest.approx(10)
    assert found.stable == pytest.approx(10)


def test_zeros_have_no_rank() -> None:
    found = effective_ranks(delta_spectrum(torch.randn(4, 6), torch.zeros(5, 4)))
    assert (found.energy90, found.energy99, found.entropy, found.stable) == (0, 0, 0.0, 0.0)
    assert significant(torch.zeros(4)) == significant(torch.zeros(0)) == energy_rank(torch.zeros(4), 0.9) == 0


def test_all_of_the_energy_is_the_true_rank() -> None:
    """Rounding beside the largest is no rank: a pair of rank 8 whose rows repeat has 3."""
    A, B = torch.randn(3, 20), torch.randn(30, 8)
    spectrum = delta_spectrum(A[torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])], B)
    assert len(spectrum) == 8
    assert energy_rank(spectrum.square(), 1.0) == significant(spectrum.square()) == 3


def test_a_stack_is_measured_together() -> None:
    """The matrices of a stack have one rank between them: energies are summed."""
    S = torch.tensor([[3.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    assert effective_ranks(S) == effective_ranks(torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 4), "do not fit"),
        (torch.ones(2), torch.ones(3, 2), "do not fit"),
        (torch.ones(2, 2, 3), torch.ones(3, 2), "do not fit"),
        (torch.full((2, 3), math.nan), torch.ones(3, 2), "NaN"),
        (torch.ones(2, 3), torch.full((3, 2), math.inf), "infinity"),
    ],
)
def test_factors_that_are_none(A, B, message) -> None:
    with pytest.raises(ConfigError, match=message):
        delta_spectrum(A, B)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_shares_that_are_none(share) -> None:
    with pytest.raises(ConfigError, match="share"):
        energy_rank(torch.ones(3), share)
