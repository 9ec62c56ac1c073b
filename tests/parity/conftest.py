"""Parity with the installed peft 0.21.2, which is importable here only (`PYTHONPATH=.oracle`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("peft") is None:  # the rest of the suite runs without the oracle
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: products are summed in the same order on both sides, and workers do not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
