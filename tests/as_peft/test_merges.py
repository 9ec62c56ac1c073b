"""peft.utils.merge_utils by hand."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_prune,
    prune,
    reshape_weight_task_tensors,
    task_arithmetic,
    ties,
)

A, B = torch.tensor([[1.0, -4.0], [3.0, 0.5]]), torch.tensor([[2.0, 2.0], [-1.0, 0.25]])
WEIGHTS = torch.tensor([0.5, 2.0])


def test_merges():
    assert torch.equal(task_arithmetic([A, B], WEIGHTS), 0.5 * A + 2 * B)
    cut = [torch.tensor([[0.0, -4.0], [3.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])]
    assert torch.equal(magnitude_prune([A, B], WEIGHTS, 0.5), 0.5 * cut[0] + 2 * cut[1])
    assert torch.equal(ties([A, B], WEIGHTS, 0.5), torch.tensor([[4.0, -2.0], [1.5, 0.0]]))
    assert torch.equal(dare_linear([A, B], WEIGHTS, 1.0), task_arithmetic([A, B], WEIGHTS))
    assert torch.equal(dare_ties([A, B], WEIGHTS, 1.0), ties([A, B], WEIGHTS, 1.0))


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_in_steps_is_ties(method):
    stacked = torch.stack([A, B])
    mask = calculate_majority_sign_mask(stacked, method)
    weighted = stacked * reshape_weight_task_tensors(stacked, WEIGHTS)
    assert torch.equal(disjoint_merge(weighted, mask), ties([A, B], WEIGHTS, 1.0, method))


def test_pruning():
    assert torch.equal(prune(A, 0.25, "magnitude"), torch.tensor([[0.0, -4.0], [0.0, 0.0]]))
    torch.manual_seed(0)
    big = torch.ones(1000)
    kept = prune(big, 0.25, "random", rescale=True)
    assert set(kept.tolist()) == {0.0, 4.0}
    assert set(prune(big, 0.25, "random").tolist()) == {0.0, 1.0}
    assert prune(A, 1.0, "random") is A
    for arguments in ((A, -1, "random"), (A, 0.5, "whim")):
        with pytest.raises(ValueError, match=r"Density|method"):
            prune(*arguments)
