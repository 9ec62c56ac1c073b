"""The number format of a run is measured where it runs; adapters are fp32 whatever the base is."""

from __future__ import annotations

import pytest
import torch

from trimtab.train.config import TrainConfig
from trimtab.train.model import adapt, load_base
from trimtab.train.precision import GAIN, choose, speed_of_bf16


def test_what_is_measured_decides_and_is_said() -> None:
    gain = speed_of_bf16()
    assert gain > 0
    found = choose("auto", torch.device("cpu"))
    assert found.why.startswith("measured: bf16 products are ")
    if not 0.7 * GAIN < gain < 1.4 * GAIN:  # so near to the limit two measurements may differ
        assert found.name == ("bf16" if gain >= GAIN else "fp32")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_base_is_in_it_and_the_adapter_is_not(name, dtype, base_folder) -> None:
    config = TrainConfig(model=str(base_folder), data="x", precision=name)
    base = load_base(config)
    assert base.precision.why == "as asked for"
    model = adapt(base, config, steps=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def test_other_devices_are_not_measured() -> None:
    assert choose("auto", torch.device("mps")).name == "fp32"
