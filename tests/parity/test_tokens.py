"""Trained tokens by themselves, and beside an adapted head: whose rows they are, and what the file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.parity.models import build
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    gradients,
    load,
    near,
    parameters,
    quiet,
    run,
    stir,
    weights_file,
)

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


BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama_tied", {"target_modules": ["lm_head"]}),
    "head and projections": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    "no tied head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
}


@pytest.mark.parametrize(("name", "fields"), BESIDE.values(), ids=BESIDE)
def test_beside_an_adapted_head(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """The embedding keeps the rows; where the head is tied, its own change comes on top of them; files are the same."""
    ours, theirs = both(name, "LoraConfig", **fields, trainable_token_indices=[4, 8])
    assert list(parameters(ours)) == list(parameters(theirs))
    y = run(theirs, name)
    near(run(ours, name), y)
    mine, yours = gradients(ours, name, train=False), gradients(theirs, name, train=False)
    all_near({n: mine[n] for n in yours}, yours)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    all_near(weights_file(tmp_path / "ours"), weights_file(tmp_path / "theirs"))
    for library in BOTH:
        for folder in ("ours", "theirs"):
            near(run(load(library, name, tmp_path / folder).eval(), name), y)
    quiet(ours.merge_adapter)
    near(run(ours, name), y)
    ours.unmerge_adapter()
    near(run(ours, name), y)
    near(run(quiet(ours.merge_and_unload), name), y)


def test_merging_an_adapted_head_with_tied_tokens_changes_outputs_in_peft() -> None:
    for model, right in zip(both("llama_tied", "LoraConfig", **BESIDE["head"][1], trainable_token_indices=[4, 8]),
                            (True, False), strict=True):  # fmt: skip
        y = run(model, "llama_tied")
        quiet(model.merge_adapter)
        assert (float((run(model, "llama_tied") - y).detach().abs().max()) < 1e-4) == right


def test_dora_of_a_head_with_tied_tokens_fails_in_peft() -> None:
    for library, right in zip(BOTH, (True, False), strict=True):
        config = library.LoraConfig(target_modules=["lm_head"], use_dora=True, trainable_token_indices=[4, 8])
        model = quiet(library.get_peft_model, build("llama_tied"), config).eval()
        stir(model)
        if not right:
            with pytest.raises(AttributeError):
                run(model, "llama_tied")
            continue
        y = run(model, "llama_tied")
        quiet(model.merge_adapter)
        near(run(model, "llama_tied"), y)


def test_a_shared_pair_and_tokens_are_one_weight() -> None:
    """With ensure_weight_tying embedding and head have the same rows and the same change, tokens last at both."""
    config = trimtab.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, trainable_token_indices=[4])
    model = quiet(trimtab.get_peft_model, build("llama_tied"), config).eval()
    stir(model)
    y = run(model, "llama_tied")
    base = quiet(model.merge_and_unload)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    near(run(base, "llama_tied"), y)
