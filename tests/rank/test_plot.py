"""Pictures of surveys: one layer, many, with and without a base, none that has anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trimtab
from tests.models import llama, toy
from tests.rank.adapters import LAYERS, lora, saved
from trimtab import inspect_ranks, plot_survey


@pytest.mark.parametrize(
    ("build", "fields", "based"),
    [
        (toy, {"target_modules": LAYERS}, False),
        (toy, {"target_modules": ["up"]}, True),
        (lambda: llama(num_hidden_layers=40), {"target_modules": "all-linear"}, False),
        (llama, {"target_modules": ["q_proj", "lm_head"], "r": 1}, True),
    ],
)
def test_every_shape_of_survey_is_drawn(build: Any, fields: dict[str, Any], based: bool, tmp_path: Path) -> None:
    found = inspect_ranks(saved(tmp_path, lora(build(), **fields)), build() if based else None, epsilon=1.0)
    path = plot_survey(found, tmp_path / "new" / "ranks.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_survey(found, tmp_path / "ranks.svg").read_text().startswith("<?xml")


def test_an_adapter_that_changes_nothing_is_drawn(tmp_path: Path) -> None:
    trimtab.get_peft_model(toy(), trimtab.LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    assert plot_survey(inspect_ranks(tmp_path), tmp_path / "x.png").stat().st_size > 5000
