"""Which rows of the contract `make test` leaves to `make test-all`: those that repeat others, layer and format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.cases import CASES

FIRST = {case.name for case in {c.peft_type: c for c in reversed(CASES)}.values()}  # of each method
LIKE = {"head": "up", "scaled": "embed"}  # layers of the toy that differ little from another one
ROUNDED = {**LIKE, "down": "up"}  # and those whose results in half precision do


def repeats(case: Any, site: str, dtype: torch.dtype | None) -> bool:
    """Whether the case runs at a layer like this one, and here the method's first case, or the same in fp32."""
    again = case.name not in FIRST and LIKE.get(site) in case.names
    return again or (dtype == torch.bfloat16 and ROUNDED.get(site) in case.names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if {"case", "site"} <= given.keys() and repeats(given["case"], given["site"], given.get("dtype")):
            item.add_marker(pytest.mark.slow)
