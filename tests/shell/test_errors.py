"""What goes wrong is said, all at once, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.cases import move
from tests.core.test_config import VALUES
from tests.models import assert_untouched, llama, logits, snapshot, tokens, toy
from trimtab import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from trimtab.core.fields import default_of
from trimtab.errors import AdapterNameError, ConfigError, NoMatchingPeftModuleError, PeftError, PeftWarning

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = tokens()


def adapted() -> PeftModel:
    model = get_peft_model(toy(), CONFIG).eval()
    move(model, "default")
    return model


# ---------------------------------------------------------------------- configs that cannot work
BAD: dict[str, tuple[Any, Any, str]] = {
    "unmatched": (
        LoraConfig(target_modules=["upp"]),
        NoMatchingPeftModuleError,
        "nearest names in this model are 'up'",
    ),
    "regex unmatched": (LoraConfig(target_modules="up.*x"), NoMatchingPeftModuleError, "not found in the base model"),
    "nothing to train": (LoraConfig(target_modules=[]), NoMatchingPeftModuleError, "selects nothing to train"),
    "no default": (LoraConfig(), ConfigError, "Please specify `target_modules`"),
    "r = 0": (LoraConfig(r=0, target_modules=["up"]), ConfigError, "`r` should be a positive integer value .* is 0"),
    "r < 0": (LoraConfig(r=-3, target_modules=["up"]), ConfigError, "value passed is -3"),
    "r = 0 by pattern": (
        LoraConfig(target_modules=["up", "head"], rank_pattern={"head": 0}),
        ConfigError,
        "value passed is 0",
    ),
    "a layer of no kind": (LoraConfig(target_modules=["norm"]), ConfigError, "is not supported.*Lora at 'norm'"),
    "a bias for an embedding": (
        LoraConfig(target_modules=["up", "embed"], lora_bias=True),
        ConfigError,
        "'embed' has no bias",
    ),
    "an odd rank": (LoraConfig(r=3, target_modules=["up"], init_lora_weights="orthogonal"), ConfigError, "to be even"),
    "an unknown start": (LoraConfig(target_modules=["up"], init_lora_weights="magic"), ConfigError, "'magic'"),
    "both adapted and saved": (
        LoraConfig(target_modules=["up"], modules_to_save=["up"]),
        NoMatchingPeftModuleError,
        "excluded",
    ),
    "tokens of no module": (
        LoraConfig(target_modules=["up"], trainable_token_indices={"embedd": [1]}),
        NoMatchingPeftModuleError,
        "nearest names .*'embed'",
    ),
    "tokens beyond the end": (
        TrainableTokensConfig(token_indices=[99], target_modules=["embed"]),
        (PeftError, IndexError),
        "99|out of",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_config_that_cannot_work_changes_nothing(what: str) -> None:
    config, error, message = BAD[what]
    base = toy().train()
    before = snapshot(base)
    wanted = config.copy()
    with pytest.raises(error, match=message):
        get_peft_model(base, config)
    assert_untouched(base, before)
    assert all(p.requires_grad for p in base.parameters())
    assert config == wanted
    with pytest.raises(error, match=message):
        inject_adapter_in_model(config, base)
    assert_untouched(base, before)
    model = adapted()
    expected, before = model(IDS), snapshot(model)
    with pytest.raises(error, match=message):
        model.add_adapter("new", config)
    after = snapshot(model)
    assert after["modules"].items() >= before["modules"].items()
    assert after["parameters"] == before["parameters"]
    assert after["bits"].keys() == before["bits"].keys()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in before["parameters"] if "lora_" in n
    }
    model.add_adapter("new", CONFIG)  # the name is free


def test_some_of_several_targets() -> None:
    config = LoraConfig(r=2, target_modules=["up", "hed"])
    with pytest.warns(PeftWarning, match=r"\['hed'\] fit no module.*'head'"):
        get_peft_model(toy(), config)
    base = toy()
    before = snapshot(base)
    with pytest.raises(NoMatchingPeftModuleError, match="'head'"):
        get_peft_model(base, config, strict=True)
    assert_untouched(base, before)


def test_a_typo_in_modules_to_save() -> None:
    with pytest.warns(PeftWarning, match=r"`modules_to_save` \['nrom'\] fit no module.*'norm'"):
        get_peft_model(toy(), LoraConfig(target_modules=["up"], modules_to_save=["nrom"]))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys_that_fit_nothing(field: str) -> None:
    with pytest.warns(PeftWarning, match=rf"`{field}` keys \['down'\] fit none of the adapted modules"):
        get_peft_model(toy(), LoraConfig(target_modules=["up"], **{field: {"down": 4}}))


# ---------------------------------------------------------------------- fields that do not act yet
DEFAULTS = {f.name: default_of(f) for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("field", sorted(LoraConfig.pending))
def test_pending_fields_are_named_at_injection_and_only_when_set(field: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["up"], **{field: VALUES[field]})
    config.save_pretrained(tmp_path)  # keeping it is fine
    assert getattr(LoraConfig.from_pretrained(tmp_path), field) == VALUES[field]
    base = toy()
    before = snapshot(base)
    with pytest.raises(NotImplementedError, match=f"`{field}="):
        get_peft_model(base, config)
    assert_untouched(base, before)
    get_peft_model(base, LoraConfig(target_modules=["up"], **{field: DEFAULTS[field]}))


# ---------------------------------------------------------------------- names
def test_duplicate_names() -> None:
    model = adapted()
    with pytest.raises(AdapterNameError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", CONFIG)


def test_unknown_names_list_the_known_ones() -> None:
    model = adapted()
    for act in (
        lambda: model.set_adapter("nobody"),
        lambda: model.set_adapter(["default", "nobody"]),
        lambda: model.set_requires_grad("nobody"),
        lambda: model.merge_adapter(["nobody"]),
        lambda: model(IDS, adapter_names=["default", "nobody", "__base__", "default"]),
    ):
        with pytest.raises(AdapterNameError, match=r"nobody.*\. Known: \['default'\]"):
            act()
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    assert model.active_adapters == ["default"]


def test_a_name_that_other_libraries_may_take_for_the_prefix() -> None:
    with pytest.warns(PeftWarning, match="'lora' should not be contained in the prefix"):
        get_peft_model(toy(), CONFIG, adapter_name="lora")


# ---------------------------------------------------------------------- mixed batches
@pytest.mark.parametrize("names", [["default"], ["default"] * 5, []])
def test_adapter_names_of_the_wrong_length(names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"should be the same as the number of inputs, but got {len(names)} and 4"):
        adapted()(IDS, adapter_names=names)


def test_adapter_names_in_training() -> None:
    with pytest.raises(ValueError, match="when the model is in training mode"):
        adapted().train()(IDS, adapter_names=["default"] * 4)


def test_adapter_names_while_merged() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(IDS, adapter_names=["default"] * 4)


def test_rows_that_cannot_be_told_apart() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x[:-1])

    model = get_peft_model(Odd(), LoraConfig(target_modules=["up"])).eval()
    with pytest.raises(RuntimeError, match="sees an input whose leading axes are"):
        model(torch.randn(4, 4), adapter_names=["default"] * 4)


# ---------------------------------------------------------------------- merging
def test_merging_twice_and_unmerging_twice_say_so() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="already merged, nothing to do") as caught:
        model.merge_adapter()
    assert len(caught) == 1, "once, not once a layer"
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match="Already unmerged") as caught:
        model.unmerge_adapter()
    assert len(caught) == 1


def test_deleting_what_is_merged() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(model(IDS), toy()(IDS))


def test_a_second_start_that_changes_the_base() -> None:
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa")
    model = get_peft_model(toy(), config).eval()
    expected = model(IDS)
    with pytest.raises(ValueError, match="'default' has changed the base's own weight"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS), expected)


def test_only_one_adapter_trains_the_bases_biases() -> None:
    model = get_peft_model(toy(), LoraConfig(target_modules=["up"], bias="all")).eval()
    with pytest.raises(ConfigError, match="LoraModel supports only 1 adapter with bias"):
        model.add_adapter("second", LoraConfig(target_modules=["up"], bias="lora_only"))


def test_failed_from_pretrained_leaves_no_trace(tmp_path: Path) -> None:
    base = llama()
    before, expected = snapshot(base), logits(base, IDS)
    with pytest.raises(PeftError, match="Can't find"):
        PeftModel.from_pretrained(base, tmp_path)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="holds neither"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)
    assert torch.equal(logits(base, IDS), expected)
    assert all(p.requires_grad for p in base.parameters())
