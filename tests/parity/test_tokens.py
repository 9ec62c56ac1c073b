"""Trained tokens by themselves, and beside an adapted head: whose rows they are, and what the file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.models import build
from tests.parity.pairs import BOTH, copy_state, load, near, parameters, quiet, run, stir, weights_file

CASES: dict[str, tuple[str, list[str] | None]] = {
    "default": ("llama", None),
    "embedding": ("llama", ["embed_tokens"]),
    "tied": ("llama_tied", ["embed_tokens"]),
    "head of a tied pair": ("llama_tied", ["lm_head"]),
}


def both(name: str, kind: str, **fields: Any) -> tuple[Any, Any]:
    """(ours, theirs) with the same numbers."""
    models = []
    for library in BOTH:
        torch.manual_seed(0)
        models.append(quiet(library.get_peft_model, build(name), getattr(library, kind)(**fields)).eval())
    stir(models[1])
    copy_state(models[1], models[0])
    return models[0], models[1]


@pytest.mark.parametrize(("name", "targets"), CASES.values(), ids=CASES)
def test_alone(name: str, targets: list[str] | None, tmp_path: Path) -> None:
    """The same parameters, outputs and files, which each reads from the other; the base's embedding is in none."""
    ours, theirs = both(name, "TrainableTokensConfig", token_indices=[4, 8], target_modules=targets)
    assert list(parameters(ours)) == list(parameters(theirs))
    near(run(ours, name), run(theirs, name))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert weights_file(tmp_path / "ours").keys() == weights_file(tmp_path / "theirs").keys()
    for library in BOTH:
        for folder in ("ours", "theirs"):
            near(run(load(library, name, tmp_path / folder), name), run(theirs, name))


def test_beside_an_adapted_head_that_is_tied() -> None:
    """The embedding keeps them, wherever else the adapter acts."""
    ours, theirs = both("llama_tied", "LoraConfig", target_modules=["lm_head"], trainable_token_indices=[4, 8])
    assert list(parameters(ours)) == list(parameters(theirs))
