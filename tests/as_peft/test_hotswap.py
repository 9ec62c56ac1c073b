"""peft.utils.hotswap: another adapter's numbers in the parameters that are there."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from safetensors.torch import load_file

from tests.models import tokens, toy

IDS = tokens()


def made(targets, r=2, **fields):
    torch.manual_seed(5)
    return get_peft_model(toy(), LoraConfig(r=r, target_modules=targets, init_lora_weights=False, **fields)).eval()


CASES = {
    "other numbers and scale": (made, (["up"],), {}, (["up"],), {"lora_alpha": 32}),
    "a larger rank": (made, (["up"],), {}, (["up"],), {"r": 4}),
    "a smaller rank": (made, (["up"],), {"r": 3}, (["up"],), {"r": 1}),
    "every kind of layer": (made, (["up", "embed", "conv"],), {}, (["up", "embed", "conv"],), {"r": 5}),
    "fewer layers": (made, (["up", "head"],), {}, (["up"],), {}),
    "DoRA": (made, (["up"],), {"use_dora": True}, (["up"],), {"use_dora": True, "r": 3}),
    "patterns": (made, (["up", "head"],), {}, (["up", "head"],), {"rank_pattern": {"head": 5}}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prepared", [False, True])
def test_swapped_in_place(name, prepared, tmp_path):
    make, first, fields, second, others = CASES[name]
    model, other = make(*first, **fields), make(*second, **others)
    other.save_pretrained(tmp_path)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    held = dict(model.named_parameters())
    model(IDS)
    hotswap_adapter(model, tmp_path, "default")
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in held.items())
    torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(toy(), tmp_path / "again")
    torch.testing.assert_close(again(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    assert ranks(tmp_path / "again") == ranks(tmp_path) | (ranks(tmp_path / "again") if name == "fewer layers" else {})


def ranks(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensor.shape for key, tensor in tensors.items() if ".lora_" in key}


@pytest.mark.parametrize("told", [False, True], ids=["", "config"])
@pytest.mark.parametrize("kind", ["up", "embed", "conv", "head"])
def test_what_was_padded_is_saved_with_its_ranks_and_loads_alone(told, kind, tmp_path):
    fields = {"rank_pattern": {"down": 3}, "alpha_pattern": {"down": 5}, "lora_alpha": 7}
    model = made([kind, "down"], **fields)
    model.save_pretrained(tmp_path / "before")
    wanted = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config if told else None)
    torch.testing.assert_close(model(IDS), wanted)
    model.save_pretrained(tmp_path / "after")
    assert ranks(tmp_path / "after") == ranks(tmp_path / "before")
    again = PeftModel.from_pretrained(toy(), tmp_path / "after")
    assert (again.active_peft_config.r, again.active_peft_config.rank_pattern) == (2, {"down": 3})
    torch.testing.assert_close(again(IDS), wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad)
    model.load_adapter(tmp_path / "before", "default")
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("parked")
def test_padded_adapters_that_are_parked_come_back():
    model = made(["up", "head"])
    wanted = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for i in range(12):
        model.add_adapter(f"other {i}", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        model.set_adapter(f"other {i}")
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_is_swapped_without_compiling_again(compiled, tmp_path):
    model, other = made(["up", "head"]), made(["up", "head"], r=4, lora_alpha=2)
    other.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    runs = torch.compile(model, backend="eager") if compiled else model
    runs(IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(runs, tmp_path, "default")
        torch.testing.assert_close(runs(IDS), other(IDS), rtol=1e-5, atol=1e-5)


def test_an_injected_adapter_is_swapped_from_a_state_dict():
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    net = inject_adapter_in_model(config, toy(), "mine").eval()
    other = inject_adapter_in_model(LoraConfig(r=3, target_modules=["up"], init_lora_weights=False), toy(), "x").eval()
    state = get_peft_model_state_dict(other, adapter_name="x")
    hotswap_adapter_from_state_dict(net, state, "mine", LoraConfig(r=3, target_modules=["up"]))
    torch.testing.assert_close(net(IDS), other(IDS))
    memory = {n.replace(".x.", ".mine."): p.detach() + 1 for n, p in other.named_parameters() if "lora_" in n}
    hotswap_adapter_from_state_dict(net, memory, "mine", LoraConfig(r=3, target_modules=["up"]))
    assert all(torch.equal(p, memory[n]) for n, p in net.named_parameters() if "lora_" in n)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    model = made(["up"])
    expected = model(IDS)
    made(["up", "head"]).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*head"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(IDS), expected)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        check_hotswap_configs_compatible(LoraConfig(), IA3Config())
    with pytest.raises(ValueError, match="only supports LORA but IA3"):
        check_hotswap_configs_compatible(IA3Config(), IA3Config())
    with pytest.raises(ValueError, match="for use_dora, True != False"):
        check_hotswap_configs_compatible(LoraConfig(use_dora=True), LoraConfig())
    with pytest.raises(ValueError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=1)
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(toy(), target_rank=4)
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=4)
