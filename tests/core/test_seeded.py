"""What is drawn from a seed of ours leaves torch's own random numbers as they were, on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import toy
from trimtab import AdamssConfig, LoraConfig, PsoftConfig, get_peft_model
from trimtab.core.seeded import seeded

STARTS = {
    "pissa": LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["up"]),
    "psoft": PsoftConfig(r=2, psoft_svd="lowrank", target_modules=["up"]),
    "adamss": AdamssConfig(r=2, num_subspaces=2, target_modules=["up"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_seeds_no_accelerator_that_it_does_not_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[Any] = []
    model = toy()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)  # what torch.manual_seed does to accelerators
    get_peft_model(model, STARTS[name])
    assert not seeds


def test_numbers_are_those_of_torch_manual_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(7)
    with seeded(5, torch.device("cpu")):
        assert torch.equal(torch.rand(4), expected)
    found = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(4))
