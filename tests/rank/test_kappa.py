"""KappaTune: targets by the condition numbers of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab import KappaTuneSelector, LoraConfig, find_kappa_target_modules, get_peft_model


def with_values(*values: float, shape: tuple[int, int] = (5, 4)) -> Tensor:
    """A random matrix of given singular values."""
    U, V = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in shape)
    return U @ torch.diag(torch.tensor(values)) @ V.T


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.stack([with_values(2.0, 1, 1, 1), with_values(6.0, 3, 2, 1)]))
        self.other = nn.Parameter(torch.randn(2, 5, 4))


class Net(nn.Module):
    """Linear layers with kappa 8, 2 and 4; experts with kappas 2 and 6; one layer that is singular."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.dead = (nn.Linear(4, 5) for _ in range(4))
        self.wide = nn.Linear(4, 40)
        self.experts = Experts()
        with torch.no_grad():
            for layer, top in ((self.a, 8.0), (self.b, 2.0), (self.c, 4.0)):
                layer.weight.copy_(with_values(top, 2, 1, 1))
            self.dead.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def test_the_smallest_condition_numbers_come_first() -> None:
    selector = KappaTuneSelector(Net(), max_dim_size_to_analyze=20, show_progress=False)
    assert selector.get_best_targets() == ["b", "c", "a", "dead"]  # a singular one is the last of all
    assert selector.get_best_targets(num_modules=2) == ["b", "c"]
    assert selector.get_best_targets(top_p=0.01) == ["b"]
    assert selector.get_best_targets(threshold=4.5) == ["b", "c"]
    assert selector.get_best_target_parameters() == ["experts.up_proj"]
    assert selector.get_best_target_parameters(threshold=3.9) == []  # (2 + 6) / 2 = 4
    assert selector.get_best_target_parameters(threshold=4.1) == ["experts.up_proj"]


def test_what_it_finds_is_what_a_config_takes() -> None:
    found = find_kappa_target_modules(Net(), 0.5, max_dim_size_to_analyze=20, show_progress=False)
    assert found == {"target_modules": ["b", "c"], "target_parameters": ["experts.up_proj"]}
    model = get_peft_model(Net(), LoraConfig(r=1, **found))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{name}" for name in ("b", "c", "experts")}
    only = find_kappa_target_modules(nn.ModuleDict({"x": nn.Linear(3, 3)}), show_progress=False)
    assert only == {"target_modules": ["x"], "target_parameters": None}


@pytest.mark.parametrize("suffixes", [(".other",), ("other",)])
def test_experts_are_told_by_their_names(suffixes: tuple[str, ...]) -> None:
    selector = KappaTuneSelector(Net(), moe_param_suffixes=suffixes, show_progress=False)
    assert selector.get_best_target_parameters() == ["experts.other"]
