"""KappaTune chooses what PEFT's chooses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.models import build
from tests.parity.pairs import BOTH


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_targets(name: str, share: float) -> None:

    found: list[Any] = [lib.find_kappa_target_modules(build(name), share, show_progress=False) for lib in BOTH]
    assert found[0] == found[1]
    assert found[0]["target_modules"]
