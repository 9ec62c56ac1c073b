"""Mixtures of experts: what one library saves the other loads, in every family; former names mean the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab
from tests.files.test_experts import FAMILIES, IDS, SHARING, build, trained
from tests.models import logits

WANTED: dict[str, Any] = {"names": list, "expression": lambda names: rf".*\.({'|'.join(names)})", "all-linear": None}


def adapt(library: Any, name: str, wanted: Any) -> Any:
    config = library.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(build(name), config).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def load(library: Any, name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(build(name), folder).eval()


def targets(name: str, form: str) -> Any:
    make = WANTED[form]
    return make([n for n in FAMILIES[name][1] if n]) if make else form


@pytest.mark.parametrize("form", WANTED)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_we_save(name: str, form: str, tmp_path: Path) -> None:
    model = adapt(trimtab, name, targets(name, form))
    model.save_pretrained(tmp_path)
    for library in (peft, trimtab):
        torch.testing.assert_close(logits(load(library, name, tmp_path), IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", WANTED)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "phimoe"])
def test_we_load_what_peft_saves(name: str, form: str, tmp_path: Path) -> None:
    model = adapt(peft, name, targets(name, form))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(trimtab, name, tmp_path), IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "phimoe"])
def test_former_names_mean_what_they_mean_in_peft(name: str) -> None:
    wanted = targets(name, "names")
    ours, theirs = (adapt(library, name, list(wanted)) for library in (trimtab, peft))
    assert trained(ours) == trained(theirs)
    mine, other = (model.peft_config["default"] for model in (ours, theirs))
    assert set(mine.target_parameters or ()) == set(other.target_parameters or ())
    assert (set(mine.target_modules), mine.rank_pattern) == (set(other.target_modules), other.rank_pattern)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_has_what_peft_has_but_routers_and_the_experts_it_knows(name: str) -> None:
    ours, theirs = (trained(adapt(library, name, "all-linear")) for library in (trimtab, peft))
    routers = {n for n in theirs if n.rpartition(".")[2] in ("gate", "router")}
    experts = {n for n in ours if ".experts" in n}
    assert ours == (theirs - routers) | experts
    assert experts
    assert (experts <= theirs) == (name not in (*SHARING, "phimoe"))
