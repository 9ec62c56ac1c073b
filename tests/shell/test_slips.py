"""Newcomers' slips: what is given by mistake is named, with what was meant; nothing is changed by it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.contract.cases import move
from tests.models import assert_untouched, classifier, llama, logits, snapshot, tokens, toy
from trimtab import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from trimtab.errors import AdapterNameError, ArgumentError, ConfigError, PeftError, PeftWarning

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = tokens()


def adapted(name: str = "default") -> PeftModel:
    model = get_peft_model(toy(), CONFIG, adapter_name=name).eval()
    move(model, name)
    return model


@pytest.mark.parametrize("name", [None, 3, "no", ["default", "no"]])
def test_an_adapter_that_is_none_cannot_be_set(name: Any) -> None:
    model = adapted()
    for holder in (model, model.base_model):
        with pytest.raises(AdapterNameError, match=r"Adapter (None|3|no) not found"):
            holder.set_adapter(name)
    assert model.active_adapters == ["default"]


# ---------------------------------------------------------------------- arguments of another kind
WRONG: list[tuple[Any, str]] = [
    (lambda: get_peft_model(CONFIG, toy()), "takes the model first, and then the config: they are swapped"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), toy()), "takes a config here, and this is a model"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), {"r": 8}), r"takes a config, not a dict: make one of it, with LoraConfig\(\*\*"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), {"peft_type": "LORA"}), r"not a dict.*PeftConfig\.from_dict"),  # type: ignore[arg-type]
    (lambda: get_peft_model("gpt2", CONFIG), r"not its path or name: load it first, with .*from_pretrained\('gpt2'\)"),  # type: ignore[arg-type]
    (lambda: get_peft_model(Path("a/b"), CONFIG), r"load it first.*from_pretrained\('a/b'\)"),  # type: ignore[arg-type]
    (lambda: get_peft_model(None, CONFIG), r"takes a model \(a torch\.nn\.Module\), not None"),  # type: ignore[arg-type]
    (lambda: get_peft_model(llama().config, CONFIG), "not transformers.*LlamaConfig"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), "lora"), r"takes a config, not a path or name: 'lora' may be"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), LoraConfig), r"takes a config, not its class: write LoraConfig\(\)"),  # type: ignore[arg-type]
    (lambda: get_peft_model(toy(), None), r"takes a config \(LoraConfig \.\.\.\), not None"),  # type: ignore[arg-type]
    (lambda: inject_adapter_in_model(toy(), CONFIG), r"takes the model first|takes a config"),  # type: ignore[arg-type]
    (lambda: inject_adapter_in_model({"r": 8}, toy()), "takes a config, not a dict"),  # type: ignore[arg-type]
    (lambda: PeftModel(CONFIG, toy()), "swapped"),  # type: ignore[arg-type]
    (lambda: PeftModel(toy(), {"r": 8}), "not a dict"),  # type: ignore[arg-type]
    (lambda: adapted().add_adapter(CONFIG, "second"), "takes the name first, and then the config: they are swapped"),  # type: ignore[arg-type]
    (lambda: adapted().add_adapter("second", {"r": 8}), "not a dict"),  # type: ignore[arg-type]
    (lambda: PeftModel.from_pretrained("folder", toy()), r"load it first"),  # type: ignore[arg-type]
    (lambda: PeftModel.from_pretrained("some/base", "folder"), r"from_pretrained\('some/base'\)"),  # type: ignore[arg-type]
    (lambda: PeftModel.from_pretrained(toy(), CONFIG), "takes the adapter's folder or Hub id, not trimtab.*LoraConfig"),  # type: ignore[arg-type]
    (lambda: PeftModel.from_pretrained(toy(), None), "takes the adapter's folder or Hub id, not None"),  # type: ignore[arg-type]
    (lambda: PeftModel.from_pretrained(toy(), toy()), "and this is a model"),  # type: ignore[arg-type]
    (lambda: adapted().load_adapter(None, "second"), "folder or Hub id, not None"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_arguments_of_another_kind(i: int) -> None:
    act, said = WRONG[i]
    with pytest.raises(ArgumentError, match=said) as caught:
        act()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "fields", [{"r": "8"}, {"lora_alpha": None}, {"r": None}, {"r": True}, {"lora_dropout": "0.1"}]
)
def test_values_of_another_type(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"LoraConfig: `{next(iter(fields))}` should be"):
        get_peft_model(toy(), LoraConfig(target_modules=["up"], **fields))


def test_a_string_for_a_list_of_names() -> None:
    base = llama()
    before = snapshot(base)
    for wanted in ("q_proj", "q_proj,v_proj"):
        with pytest.raises(PeftError, match=r"for names write a list, target_modules=\['q_proj'"):
            get_peft_model(base, LoraConfig(target_modules=wanted))
        assert_untouched(base, before)


# ---------------------------------------------------------------------- a model that is adapted already
def test_from_pretrained_of_a_peft_model_names_load_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before, expected = snapshot(model), model(IDS)
    with pytest.raises(ArgumentError, match=rf"is a PeftModel already.*model\.load_adapter\('{tmp_path}', name\)"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("given", ["the PeftModel", "its base"])
def test_a_second_get_peft_model_goes_on_with_a_new_adapter(given: str) -> None:
    model = adapted()
    base = model.get_base_model()
    with pytest.warns(
        PeftWarning, match=r"for a second time.*`\.unload\(\)`.*'default' is replaced.*add_adapter"
    ) as caught:
        again = get_peft_model(model if given == "the PeftModel" else base, LoraConfig(r=3, target_modules=["down"]))
    assert len(caught) == 1
    assert again.get_base_model() is base
    assert list(again.peft_config) == ["default"]
    assert again.active_adapters == ["default"]
    assert {n.split("model.model.")[1] for n, p in again.named_parameters() if p.requires_grad} == {
        "down.lora_A.default.weight", "down.lora_B.default.weight",
    }  # fmt: skip
    move(again, "default")
    assert not torch.equal(again.eval()(IDS), toy()(IDS))
    assert torch.equal(again.unload()(IDS), toy()(IDS))


def test_a_second_get_peft_model_that_fails_leaves_the_first() -> None:
    model = adapted()
    expected, state = model(IDS), get_peft_model_state_dict(model)
    state = {k: v.clone() for k, v in state.items()}
    for bad in (LoraConfig(target_modules=["nowhere"]), LoraConfig(r=0, target_modules=["up"])):
        with pytest.warns(PeftWarning), pytest.raises(PeftError):
            get_peft_model(model, bad)
        assert torch.equal(model(IDS), expected)
        assert model.active_adapters == ["default"]
        assert all(torch.equal(v, state[k]) for k, v in get_peft_model_state_dict(model).items())
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if "lora_" in n
        }


def test_a_second_adapter_of_another_name_stands_beside_the_first() -> None:
    model = adapted()
    with pytest.warns(PeftWarning, match="for a second time") as caught:
        again = get_peft_model(model, LoraConfig(r=3, target_modules=["down"]), adapter_name="second")
    assert "replaced" not in str(caught[0].message)
    assert list(again.peft_config) == ["default", "second"]


# ---------------------------------------------------------------------- tasks and training
def test_a_task_whose_head_the_model_lacks() -> None:
    with pytest.warns(
        PeftWarning, match=r"task SEQ_CLS trains a head whole.*\(classifier or score\): only the adapter"
    ):
        get_peft_model(llama(), LoraConfig(task_type="SEQ_CLS"))
    with pytest.warns(PeftWarning, match="task QUESTION_ANS trains a head whole.*qa_outputs"):
        get_peft_model(llama(), LoraConfig(task_type="QUESTION_ANS"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS"))
        get_peft_model(llama(), LoraConfig(task_type="TOKEN_CLS", modules_to_save=["lm_head"]))
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))


def test_training_what_was_loaded_frozen_is_told_how_not_to(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    with pytest.warns(PeftWarning, match="the adapters are frozen. Load with is_trainable=True"):
        loaded.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.eval()
        PeftModel.from_pretrained(toy(), tmp_path, is_trainable=True).train()
        loaded.set_adapter("default")
        loaded.train()


def test_no_active_config() -> None:
    model = adapted()
    model.set_adapter([])
    with pytest.raises(AdapterNameError, match=r"No adapter is active.*set_adapter\(\) one of \['default'\]"):
        model.active_peft_config
    model.delete_adapter("default")
    with pytest.raises(AdapterNameError, match=r"No adapter is active.*the model has none"):
        model.active_peft_config


def test_an_unloaded_model_of_transformers_saves_like_any_other(tmp_path: Path) -> None:
    """transformers notes that a model has adapters, and then saves only these."""
    for unload in (lambda m: m.unload(), lambda m: m.merge_and_unload()):
        base = llama()
        base._hf_peft_config_loaded = True
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        unload(model).save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), logits(llama(), IDS))


# ---------------------------------------------------------------------- PEFT's words, where programs match them
def test_words_that_programs_match() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"All adapters are already merged, nothing to do\."):
        model.merge_adapter()
    with pytest.raises(
        ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged\. Please unmerge them first"
    ):
        model.delete_adapter("default")
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"Already unmerged\. Nothing to do\."):
        model.unmerge_adapter()


# ---------------------------------------------------------------------- injecting what a state dict has
INJECTED: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules=["up", "down"]),
    "dora": LoraConfig(r=2, target_modules=["up"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["up", "head"]),
    "ia3": IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "oft": OFTConfig(oft_block_size=2, target_modules=["up"]),
    "vera": VeraConfig(r=3, target_modules=["up"]),
    "ln_tuning": LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("form", ["injected", "PeftModel", "in memory"])
@pytest.mark.parametrize("method", INJECTED)
def test_a_state_dict_says_what_is_adapted(method: str, form: str) -> None:
    first = get_peft_model(toy(), INJECTED[method]).eval()
    move(first, "default")
    state = get_peft_model_state_dict(first)
    if form == "in memory":
        state = {k: v for k, v in first.get_base_model().state_dict().items() if ".default" in k}
    if form == "injected":
        state = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    config = INJECTED[method].copy()
    config.target_modules = {"embed"}  # what the state dict has counts
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = {"down"}
    base = inject_adapter_in_model(config, toy(), state_dict=state)
    assert get_peft_model_state_dict(base).keys() == {
        k.removeprefix("base_model.model.") if method != "vera" or "lambda" in k else k.removeprefix("base_model.")
        for k in get_peft_model_state_dict(first)
    }
    if form != "PeftModel":
        set_peft_model_state_dict(base, state)
        assert torch.equal(base.eval()(IDS), first(IDS))


def test_a_state_dict_of_another_method() -> None:
    state = get_peft_model_state_dict(get_peft_model(toy(), INJECTED["loha"]))
    base = toy()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="has no tensors of an adapter of method LORA"):
        inject_adapter_in_model(LoraConfig(), base, state_dict=state)
    assert_untouched(base, before)


def test_parameters_are_told_by_the_config() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.stack = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x) + torch.einsum("eoi,bi->bo", self.stack, x)

    config = LoraConfig(r=2, target_modules=["up"], target_parameters=["inner.stack"])
    build = lambda: nn.ModuleDict({"inner": Experts()})
    state = get_peft_model_state_dict(inject_adapter_in_model(config, build()))
    again = inject_adapter_in_model(config, build(), state_dict=state)
    assert get_peft_model_state_dict(again).keys() == state.keys()
