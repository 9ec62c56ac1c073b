"""LoRA and DoRA, every acting field: the same names, outputs, gradients, merges and files as PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab
from tests.parity.cases import CASES
from tests.parity.models import build
from tests.parity.pairs import (
    BOTH,
    adapt,
    config_file,
    copy_state,
    dropping,
    gradients,
    load,
    near,
    pair,
    parameters,
    quiet,
    run,
    trainable,
    weights_file,
)
from trimtab.files.codec import IGNORED

each = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)


@each
def test_names_and_shapes(name: str, fields: dict[str, Any]) -> None:
    """Parameters have PEFT's names, shapes, number formats and states, in the model and in its state dict."""
    ours, theirs = (adapt(library, name, fields) for library in BOTH)
    mine, other = parameters(ours), parameters(theirs)
    assert list(mine) == list(other)  # in the same order, as optimisers number them
    assert {n: (p.shape, p.dtype) for n, p in mine.items()} == {n: (p.shape, p.dtype) for n, p in other.items()}
    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@each
def test_outputs_and_gradients(name: str, fields: dict[str, Any]) -> None:
    """The same numbers in give the same numbers out, in training (without dropout) and in evaluation."""
    ours, theirs = pair(name, fields)
    train = not dropping(fields)
    near(run(ours.train(train), name), run(theirs.train(train), name))
    near(run(ours.eval(), name), run(theirs.eval(), name))
    mine, other = gradients(ours, name, train), gradients(theirs, name, train)
    assert mine.keys() == other.keys()
    for key, gradient in other.items():
        near(mine[key], gradient)


@each
def test_merge(name: str, fields: dict[str, Any]) -> None:
    """Merged weights are PEFT's; the merged model computes what the adapted one did."""
    ours, theirs = (model.eval() for model in pair(name, fields))
    before = run(ours, name)
    merged = quiet(ours.merge_and_unload)
    near(run(merged, name), before, 3e-5)
    if fields.get("lora_bias"):  # PEFT refuses to merge it into a layer without a bias
        return
    tokens = fields.get("trainable_token_indices")
    if name == "llama_tied" and isinstance(tokens, dict) and tokens["lm_head"] != tokens.get("embed_tokens"):
        return  # PEFT's merge puts what the head alone has into the embedding, too (docs/differences.md)
    other = quiet(theirs.merge_and_unload)
    assert parameters(merged).keys() == parameters(other).keys()
    for key, weight in parameters(other).items():
        near(parameters(merged)[key], weight)


@each
def test_files(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Both write the same files, and each reads the other's."""
    ours, theirs = (model.eval() for model in pair(name, fields))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    mine, other = weights_file(tmp_path / "ours"), weights_file(tmp_path / "theirs")
    assert mine.keys() == {k for k in other if not any(part in k for part in IGNORED)}
    for key, tensor in mine.items():
        near(tensor, other[key], 0)
    wanted = run(theirs, name)
    for library in BOTH:
        for folder in ("ours", "theirs"):
            near(run(load(library, name, tmp_path / folder), name), wanted, 3e-5)


@pytest.mark.parametrize("name", ["dropout", "dropout_embedding", "dora_dropout"])
def test_dropout_has_the_same_distribution(name: str) -> None:
    """Mean and spread of the outputs over many masks."""
    model, fields = CASES[name]
    draws = []
    for side in pair(model, fields):
        side.train()
        with torch.no_grad():
            draws.append(torch.stack([run(side, model, seed=i).float() for i in range(200)]))
    (mine, other), n = draws, 200
    spread = other.std(0)
    error = ((mine.mean(0) - other.mean(0)).abs() / (spread * (2 / n) ** 0.5 + 1e-6)).flatten()
    assert error.max() < 6
    assert error.mean() < 1.2, "0.8 for equal distributions"
    wide = spread > 1e-4
    assert wide.any()
    assert abs(float((mine.std(0)[wide] / spread[wide]).mean()) - 1) < 0.05


@each
def test_unload(name: str, fields: dict[str, Any]) -> None:
    """Taking the adapter out leaves what PEFT leaves; with `pristine` the very base there was."""
    left = []
    for library in BOTH:
        model = adapt(library, name, fields)
        copy_state(model, model)
        left.append(parameters(quiet(model.unload)))
    assert left[0].keys() == left[1].keys()
    for key, weight in left[1].items():
        near(left[0][key], weight)
    base = build(name)
    modules, bits = dict(base.named_modules()), copy.deepcopy(base.state_dict())
    model = quiet(trimtab.get_peft_model, base, quiet(trimtab.LoraConfig, **fields))
    copy_state(model, model)
    assert model.unload(pristine=True) is base
    assert dict(base.named_modules()) == modules
    assert all(torch.equal(bits[k], v) for k, v in base.state_dict().items())


def test_oracle() -> None:
    """What we compare with."""
    assert peft.__version__ == "0.21.2"
