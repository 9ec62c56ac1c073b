"""Poly against PEFT: its calls say the rows' tasks, which those of the other methods' tests do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab
from tests.parity.models import batch, build
from tests.parity.pairs import BOTH, all_near, config_file, copy_state, near, quiet, stir, trainable, weights_file

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"task_type": "CAUSAL_LM", "n_tasks": 3}),
    "splits": ("llama", {"task_type": "CAUSAL_LM", "n_tasks": 2, "n_skills": 3, "n_splits": 4, "r": 3}),
    "random": ("llama", {"task_type": "CAUSAL_LM", "init_weights": False, "target_modules": ["q_proj", "down_proj"]}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM", "n_tasks": 3}),
}
every = pytest.mark.parametrize("case", CASES)


def adapt(library: Any, case: str) -> Any:
    name, fields = CASES[case]
    torch.manual_seed(11)
    return quiet(library.get_peft_model, build(name), library.PolyConfig(**fields)).eval()


def pair(case: str) -> tuple[Any, Any]:
    ours, theirs = (adapt(library, case) for library in BOTH)
    stir(theirs)
    copy_state(theirs, ours)
    return ours, theirs


def inputs(case: str) -> dict[str, Any]:
    name, fields = CASES[case]
    asked = batch(name)
    rows = len(next(iter(asked.values())))
    return asked | {"task_ids": torch.arange(rows) % fields.get("n_tasks", 1)}


@every
def test_names_and_starts(case: str) -> None:
    ours, theirs = (adapt(library, case) for library in BOTH)
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(held[name], parameter), name
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__ == "PolyModel"


@every
def test_outputs_gradients_and_generation(case: str) -> None:
    results = []
    for model in pair(case):
        logits = model(**inputs(case)).logits
        logits.float().square().mean().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        asked = {k: v for k, v in inputs(case).items() if k in ("input_ids", "attention_mask", "task_ids")}
        results[-1] += (model.generate(**asked, max_new_tokens=4, do_sample=False),)
    (ours, mine, said), (theirs, yours, answer) = results
    near(ours, theirs)
    all_near(mine, yours)
    assert torch.equal(said, answer)


@every
@pytest.mark.parametrize("writer", [0, 1], ids=["ours", "theirs"])
def test_files_both_ways(case: str, writer: int, tmp_path: Path) -> None:
    both = pair(case)
    for model, folder in zip(both, ("0", "1"), strict=True):
        quiet(model.save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    assert mine.keys() == yours.keys()
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    library = (trimtab, peft)[1 - writer]
    read = quiet(library.PeftModel.from_pretrained, build(CASES[case][0]), str(tmp_path / str(writer)))
    near(read.eval()(**inputs(case)).logits, both[writer](**inputs(case)).logits)


def test_beams_of_tasks() -> None:
    """PEFT's layers see more rows than tasks with beams, and fail."""
    ours, theirs = pair("t5")
    asked = {k: v for k, v in inputs("t5").items() if k in ("input_ids", "task_ids")}
    assert len(ours.generate(**asked, num_beams=2, max_new_tokens=3)) == len(asked["input_ids"])
    with pytest.raises(RuntimeError):
        theirs.generate(**asked, num_beams=2, max_new_tokens=3)


def test_fields() -> None:
    ours, theirs = (library.PolyConfig().to_dict() for library in BOTH)
    assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}
    from peft.utils import constants

    from trimtab.methods.poly import Poly

    table = constants.TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else set(v) for k, v in Poly.targets.items()} == {
        k: v if isinstance(v, str) else set(v) for k, v in table.items()
    }
