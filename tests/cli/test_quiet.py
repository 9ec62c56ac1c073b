"""Other libraries' warnings and bars are not shown, ours are, once; `--verbose` shows all; nothing stays changed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from trimtab.cli.quiet import quiet
from trimtab.errors import PeftWarning

NOISE = """
import logging, sys, warnings
from trimtab.cli.quiet import quiet
from trimtab.errors import PeftWarning
with quiet(verbose=len(sys.argv) > 1):
    from tqdm.auto import tqdm
    from transformers.utils import logging as theirs
    logging.getLogger("library").warning("a library's warning")
    theirs.get_logger("transformers.x").warning("transformers' warning")
    warnings.warn("an outsider's warning")
    list(tqdm(range(3), desc="a bar"))
    list(theirs.tqdm(range(3), desc="transformers' bar"))
    for _ in range(2):
        warnings.warn("our warning", PeftWarning)
    logging.getLogger("library").error("a library's error")
"""


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, "-c", NOISE, *args], capture_output=True, text=True, check=True)
    return done.stderr


def test_only_our_lines_and_others_errors_are_shown() -> None:
    assert run().splitlines() == ["Warning: our warning", "a library's error"]


def test_verbose_shows_all() -> None:
    said = run("--verbose")
    for words in (
        "a library's warning", "transformers' warning", "an outsider's warning", "a bar", "transformers' bar",
        "our warning", "a library's error",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("bars", [None, "0"])
def test_afterwards_all_is_as_it_was(bars, monkeypatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if bars is not None:
        monkeypatch.setenv("TQDM_DISABLE", bars)
    show, level = warnings.showwarning, logging.root.manager.disable

    def fail() -> None:
        with quiet():
            assert not logging.getLogger("any").isEnabledFor(logging.WARNING)
            os.environ["SET_WITHIN"] = "1"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.environ.get("TQDM_DISABLE") == bars
    assert os.environ.pop("SET_WITHIN") == "1"
    assert warnings.showwarning is show
    assert logging.root.manager.disable == level
    with pytest.warns(PeftWarning):
        warnings.warn("shown as ever", PeftWarning, stacklevel=1)
