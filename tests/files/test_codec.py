"""Keys of every form are read, and written in one; a state dict that lacks tensors is not saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tests.contract.cases import move
from tests.models import assert_untouched, classifier, gpt2, logits, snapshot, tokens, toy
from trimtab import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from trimtab.errors import AdapterFileError
from trimtab.files.codec import as_written, unwrapped
from trimtab.files.store import WEIGHTS

IDS = tokens(2, 5, 60)

# Leaves of every kind: plain ones, one with a name of its own on disk, tokens, copies, what is kept once, prompts.
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lora": (toy, LoraConfig(r=2, target_modules=["up", "head", "embed"])),
    "bias": (toy, LoraConfig(r=2, target_modules=["up", "down"], lora_bias=True, bias="all")),
    "dora": (toy, LoraConfig(r=2, target_modules=["up", "down"], use_dora=True)),
    "tokens": (gpt2, LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[1, 7])),
    "head": (classifier, LoraConfig(task_type="SEQ_CLS", r=2)),
    "vera": (toy, VeraConfig(r=3, target_modules=["up"])),
    "prompt": (gpt2, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


def adapted(case: str, name: str = "default") -> PeftModel:
    base, config = CASES[case]
    model = get_peft_model(base(), config.copy(), adapter_name=name).eval()
    move(model, name)
    return model


def ids(case: str) -> Tensor:
    return tokens() if CASES[case][0] is toy else IDS


def in_memory(model: PeftModel) -> dict[str, Tensor]:
    """The keys that a training script finds in the model itself."""
    names = {
        slot.in_memory() for a in model.graft.adapters.values() for slot in model.graft.slots(a) if not slot.optional
    }
    return {k: v.clone() for k, v in model.state_dict().items() if k in names}


def rewrite(folder: Path, change: Callable[[str], str]) -> None:
    values = {change(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(values, folder / WEIGHTS)


# ---------------------------------------------------------------------- reading
FORMS: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "in parallel": lambda key: f"module.{key}",
    "in parallel and compiled": lambda key: f"module._orig_mod.{key}",
    "a layer in parallel": lambda key: key.replace("model.model.", "model.model.module."),
    "sharded": lambda key: key.replace("base_model.", "base_model._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("model.", "model._checkpoint_wrapped_module.", 1),
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [c for c in CASES if c != "prompt"])
def test_keys_that_wrappers_changed_are_read(case: str, form: str, tmp_path: Path) -> None:
    model = adapted(case)
    model.save_pretrained(tmp_path)
    if form == "without a prefix" and case == "vera":
        return  # what an adapter keeps once has no other name than its prefix
    rewrite(tmp_path, FORMS[form])
    loaded = PeftModel.from_pretrained(CASES[case][0](), tmp_path)
    assert torch.equal(logits(loaded, ids(case)), logits(model, ids(case)))


@pytest.mark.parametrize("case", [c for c in CASES if c != "prompt"])
@pytest.mark.parametrize("named", ["default", "some other"])
def test_keys_as_in_memory_are_read_whatever_the_adapters_name(case: str, named: str, tmp_path: Path) -> None:
    model = adapted(case, named)
    state = in_memory(model)
    config = model.peft_config[named].copy()
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / WEIGHTS)
    for name in ("default", "again"):
        loaded = PeftModel.from_pretrained(CASES[case][0](), tmp_path, adapter_name=name)
        assert torch.equal(logits(loaded, ids(case)), logits(model, ids(case)))
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / WEIGHTS)
    other = get_peft_model(CASES[case][0](), CASES[case][1].copy()).eval()
    if case != "bias":
        assert other.load_adapter(tmp_path, "second") == ([], [])
        other.set_adapter("second", inference_mode=True)
        assert torch.equal(logits(other, ids(case)), logits(model, ids(case)))
    fresh = get_peft_model(CASES[case][0](), CASES[case][1].copy()).eval()
    assert set_peft_model_state_dict(fresh, state) == ([], [])
    assert torch.equal(logits(fresh, ids(case)), logits(model, ids(case)))


def test_of_several_adapters_in_one_file_the_one_of_that_name_is_read(tmp_path: Path) -> None:
    model = adapted("lora")
    model.add_adapter("second", CASES["lora"][1])
    move(model, "second")
    model.save_pretrained(tmp_path)
    save_file(in_memory(model), tmp_path / WEIGHTS)
    for name in ("default", "second"):
        loaded = PeftModel.from_pretrained(toy(), tmp_path, adapter_name=name, strict=False)
        model.set_adapter(name, inference_mode=True)
        assert torch.equal(loaded(tokens()), model(tokens()))
    base = toy()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=r"missing keys.*unexpected keys"):
        PeftModel.from_pretrained(base, tmp_path, adapter_name="third")
    assert_untouched(base, before)


def test_a_key_that_is_nothing_is_still_unexpected(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path)
    values = load_file(tmp_path / WEIGHTS)
    save_file({**values, "base_model.model.up.lora_C.default.weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"unexpected keys .*up\.lora_C\.default\.weight"):
        PeftModel.from_pretrained(toy(), tmp_path)


def test_keys_without_wrappers() -> None:
    assert unwrapped("module.base_model._orig_mod.model.module.up.weight") == "base_model.model.up.weight"

    class Named(nn.Module):
        """A model one of whose own parts is called "module"."""

        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"up": nn.Linear(2, 2)})

    key = "base_model.model.module.up.lora_A.weight"
    assert as_written(key, Named()) == key
    assert as_written("base_model.model._orig_mod.up.lora_A.weight", toy()) == "base_model.model.up.lora_A.weight"


def test_a_part_that_is_called_module_is_saved_and_read_under_its_name(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = toy()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)  # type: ignore[no-any-return]

    model = get_peft_model(Holder(), LoraConfig(r=2, target_modules=["up"])).eval()
    move(model, "default")
    model.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.model.module.up.") for key in load_file(tmp_path / WEIGHTS))
    assert torch.equal(PeftModel.from_pretrained(Holder(), tmp_path)(tokens()), model(tokens()))


# ---------------------------------------------------------------------- wrapped models
@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "in parallel": DistributedDataParallel,
    "compiled in parallel": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "sharded": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("injected", [False, True], ids=["PeftModel", "injected"])
def test_functions_look_through_wrappers(wrapper: str, injected: bool, process_group: None) -> None:
    model: Any = adapted("lora")
    if injected:
        model = model.base_model.model
    expected = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    status, whole = get_layer_status(model), get_model_status(model)
    wrapped = WRAPPED[wrapper](model)
    assert get_layer_status(wrapped) == status
    assert get_model_status(wrapped).num_adapter_layers == whole.num_adapter_layers
    if wrapper == "sharded":
        state: dict[str, Tensor] = wrapped.state_dict()
        found = get_peft_model_state_dict(wrapped, state_dict=state)
    else:
        found = get_peft_model_state_dict(wrapped)
        assert set_peft_model_state_dict(wrapped, {k: v + 1 for k, v in found.items()}) == ([], [])
        assert all(torch.equal(v, expected[k] + 1) for k, v in get_peft_model_state_dict(model).items())
        assert set_peft_model_state_dict(wrapped, expected) == ([], [])
        found = get_peft_model_state_dict(wrapped, state_dict=wrapped.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "without a prefix"])
def test_saving_from_a_wrapped_models_state_dict(form: str, tmp_path: Path) -> None:
    model = adapted("head")
    state = {FORMS[form](key): value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path), IDS), logits(model, IDS))


def test_a_model_that_was_compiled_before_is_saved_by_its_plain_names(tmp_path: Path) -> None:
    """Whole or in parts: names in the config have no trace of it either."""
    part = gpt2()
    part.transformer.h[1] = torch.compile(part.transformer.h[1], backend="eager")
    for base in (torch.compile(gpt2(), backend="eager"), part):
        for targets in (["c_attn", "c_proj"], "all-linear", r"transformer\.h\.1\.mlp\.c_fc"):
            model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))  # type: ignore[arg-type]
            move(model, "default")
            model.save_pretrained(tmp_path)
            values, own = load_file(tmp_path / WEIGHTS), get_peft_model_state_dict(model)
            assert values.keys() == own.keys()
            assert not [key for key in values if "_orig_mod" in key]
            assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
            loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
            assert all(torch.equal(value, own[key]) for key, value in get_peft_model_state_dict(loaded).items())
            model.unload()


# ---------------------------------------------------------------------- state dicts that lack tensors
def lacking(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    keys = [key for key in state if "lora_B" in key]
    if how == "all":
        return {}
    if how == "frozen ones only":
        return {k: v for k, v in state.items() if "lora_" not in k}
    if how == "one":
        return {k: v for k, v in state.items() if k != keys[0]}
    if how == "one is empty":
        return {**state, keys[0]: torch.empty(0)}
    return {**state, keys[0]: state[keys[0]].to("meta")}


@pytest.mark.parametrize("how", ["all", "frozen ones only", "one", "one is empty", "one has no storage"])
def test_a_state_dict_that_lacks_tensors_is_not_saved(how: str, tmp_path: Path) -> None:
    model = adapted("lora")
    state = lacking(dict(model.state_dict()), how)
    for save in (
        lambda: model.save_pretrained(tmp_path / "new", state_dict=state),
        lambda: get_peft_model_state_dict(model, state_dict=state),
    ):
        with pytest.raises(
            AdapterFileError, match=r"The state dict lacks .* of the 6 tensors of adapter 'default'.*lora_B"
        ):
            save()
    assert not (tmp_path / "new").exists()


def test_a_process_that_does_not_write_may_have_no_state(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path / "none", state_dict={}, is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_model_without_storage_is_not_saved(tmp_path: Path) -> None:
    model = adapted("lora").to("meta")
    with pytest.raises(AdapterFileError, match="The model lacks 6 of the 6 tensors"):
        model.save_pretrained(tmp_path)


@pytest.mark.usefixtures("parked")
def test_adapters_that_are_parked_are_in_no_state_dict_and_saved_all_the_same(tmp_path: Path) -> None:
    model = adapted("lora")
    for i in range(12):
        model.add_adapter(f"a{i}", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    parked = [name for name, adapter in model.graft.adapters.items() if adapter.parked]
    assert parked
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    for name in parked:
        assert load_file(tmp_path / name / WEIGHTS).keys() == get_peft_model_state_dict(model, adapter_name=name).keys()


def test_the_state_dicts_numbers_are_what_is_saved(tmp_path: Path) -> None:
    model = adapted("dora")
    doubled = {k: v * 2 for k, v in model.state_dict().items()}
    found = get_peft_model_state_dict(model, state_dict=doubled)
    plain = get_peft_model_state_dict(model)
    assert all(torch.equal(found[k], plain[k] * 2) for k in plain)
    assert found.keys() == plain.keys()
    again = get_peft_model_state_dict(model, state_dict=found)  # by its keys on disk already
    assert all(torch.equal(again[k], found[k]) for k in plain)


def test_injected_models_have_keys_without_prefix() -> None:
    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), toy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = get_peft_model_state_dict(base, state_dict=base.state_dict())
    assert sorted(found) == ["up.lora_A.weight", "up.lora_B.weight"]
