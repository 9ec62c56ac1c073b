"""Adapters of any method added up: the combination's dW is the weighted sum of theirs, in forward and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.cases import CASES, Case, adapted, also, close, ids
from tests.models import SITES, toy
from trimtab import PeftModel
from trimtab.graft.combine import KINDS

WEIGHTS = {"default": 0.7, "other": -0.4}
ABLE = [c for c in CASES if c.method.mergeable and not c.mutates]


def sites(case: Case) -> tuple[str, ...]:
    """The layers of the toy at which deltas add up; of changes of biases, those that can have one."""
    names = tuple(name for name in case.names if SITES[name] in KINDS)
    if case.peft_type == "IA3" or not any(
        db is not None for _, db in changes(adapted(case, *names), "default").values()
    ):
        return names
    return tuple(name for name in names if SITES[name] != "embedding")


def two(case: Case, names: tuple[str, ...]) -> PeftModel:
    """The toy with two adapters of a case, both moved off their start."""
    model = adapted(case, *names)
    also(model, "other", case, *names)
    return model.eval()


def changes(model: Any, adapter: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{layer: (dW, db)} of an adapter by its formula, in fp64."""
    found = {}
    for path, layer in model.base_model.graft.layers.items():
        methods = layer.methods.get(adapter, ())
        if not methods:
            continue
        W, b = methods[0].site.matrix().double(), methods[0].site.bias()
        adapted, shifted = W, b
        for method in methods:
            adapted, shifted = method.weight(adapted), method.bias(shifted)
        moved = shifted is not None and shifted is not b
        found[path] = (adapted - W, (shifted if b is None else shifted - b) if moved else None)
    return found


@pytest.mark.parametrize("case", [c for c in ABLE if {SITES[n] for n in c.names} & {*KINDS}], ids=lambda c: c.name)
@torch.no_grad()
def test_the_sum_of_two_is_the_sum_of_their_deltas(case: Case, tmp_path: Path) -> None:
    model = two(case, sites(case))
    before = {name: changes(model, name) for name in WEIGHTS}
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", "svd", svd_rank=64)
    model.set_adapter("sum")
    after = changes(model, "sum")
    assert after.keys() == before["default"].keys() | before["other"].keys()
    for path, (dW, db) in after.items():
        parts = [(w, before[name][path]) for name, w in WEIGHTS.items()]
        wanted = sum(w * d for w, (d, _) in parts)
        if case.peft_type == "IA3":  # its scales add up, as in PEFT, so that W counts as often
            wanted = (
                wanted
                + (sum(WEIGHTS.values()) - 1) * model.base_model.graft.layers[path].methods["sum"][0].site.matrix()
            )
        else:
            shift = sum(w * b for w, (_, b) in parts if b is not None)
            none = torch.zeros(len(dW))
            close(none if db is None else db.float(), (none + shift).float(), torch.float32)
        close(dW, wanted.double(), torch.float32)
    out = model(ids())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(toy(), tmp_path / "sum")
    close(again(ids()), out, torch.float32)
    model.merge_adapter()
    close(model(ids()), out, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if not c.method.mergeable], ids=lambda c: c.name)
def test_what_is_no_change_of_weights_is_refused(case: Case) -> None:
    model = two(case, case.names)
    with pytest.raises(ValueError, match="no change of weights"):
        model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", "svd", svd_rank=4)
    assert "sum" not in model.peft_config
