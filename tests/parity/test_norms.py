"""Norms that keep statistics of batches: trained as copies, alone or beside LoRA; files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.pairs import BOTH, near, quiet, weights_file


class Net(nn.Module):
    """A convolution and a norm after it that has seen a batch."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = (
            nn.Conv1d(4, 6, 3),
            norm(6, affine=True, track_running_stats=True),
            nn.Linear(6, 3),
        )
        self.norm(torch.randn(8, 6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean(-1))


def noise(seed: int) -> Tensor:
    return torch.randn(4, 4, 9, generator=torch.Generator().manual_seed(seed))


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "whole": ("LoraConfig", {"target_modules": ["head"], "modules_to_save": ["norm"], "init_lora_weights": True}),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("way", WAYS)
def test_trained_saved_and_loaded(norm: type[nn.Module], way: str, tmp_path: Path) -> None:
    name, fields = WAYS[way]
    for lib in BOTH:
        model = quiet(lib.get_peft_model, Net(norm), getattr(lib, name)(**fields)).train()
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
        optimiser = torch.optim.SGD(trained, 0.1)
        for step in range(3):
            model(noise(step)).square().mean().backward()
            optimiser.step()
        quiet(model.eval().save_pretrained, str(tmp_path / lib.__name__))
        for reader in BOTH:
            read = quiet(reader.PeftModel.from_pretrained, Net(norm), str(tmp_path / lib.__name__))
            near(read(noise(9)), model(noise(9)))
            with read.disable_adapter():
                near(read(noise(9)), Net(norm).eval()(noise(9)))
        near(quiet(model.merge_and_unload).eval()(noise(9)), read(noise(9)))
    files = [weights_file(tmp_path / lib.__name__) for lib in BOTH]
    assert files[0].keys() == files[1].keys()
    for key in files[0]:
        if "lora" not in key:
            near(files[0][key].double(), files[1][key].double())
