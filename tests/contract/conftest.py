"""Which rows of the contract `make test` leaves to `make test-all`: those whose column and row are both covered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.cases import CASES

FIRST = {case.name for case in {c.peft_type: c for c in reversed(CASES)}.values()}  # of each method
LIKE = {"head": "up", "scaled": "embed"}  # layers of the toy that differ little from another one


def repeats(case: Any, site: str, dtype: torch.dtype | None) -> bool:
    """Whether the first case of the method runs here, and this case elsewhere: at a layer like it, or in fp32."""
    again = site in LIKE and LIKE[site] in case.names and case.name not in FIRST
    return again or (dtype == torch.bfloat16 and (site in LIKE or site == "down"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if {"case", "site"} <= given.keys() and repeats(given["case"], given["site"], given.get("dtype")):
            item.add_marker(pytest.mark.slow)
