"""peft.helpers and the like."""

from __future__ import annotations

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter
from peft.helpers import DoraCaching, check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTuner, _find_minimal_target_modules
from torch import nn

from tests.models import llama, tokens, toy

IDS = tokens()


@pytest.mark.parametrize("text", [None, "", "{broken", "[]", '{"peft_type": "NOPE"}', '{"r": 8}'])
def test_a_folder_without_a_sound_config_holds_no_adapter(text, tmp_path):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    assert not check_if_peft_model(str(tmp_path))
    get_peft_model(toy(), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))


def test_scales_are_changed_in_a_block_and_come_back_after_an_error():
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)).eval()
    with model.disable_adapter():
        base = model(IDS)
    full = model(IDS)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(IDS), base)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0):
        raise KeyError
    assert torch.equal(model(IDS), full)
    with pytest.raises(TypeError, match="multiplier should be of type float"), rescale_adapter_scale(model, "2"):
        pass
    for other in (toy(), get_peft_model(toy(), LNTuningConfig(target_modules=["norm"]))):
        with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"):
            rescale_adapter_scale(other, 2.0).__enter__()


def test_switches_that_nothing_depends_on_change_nothing():
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], use_dora=True, init_lora_weights=False)).eval()
    wanted = model(IDS)
    with DoraCaching(), disable_input_dtype_casting(model):
        assert torch.equal(model(IDS), wanted)
    DoraCaching(enabled=False)
    DoraCaching()(enabled=True)
    assert torch.equal(model(IDS), wanted)


def test_configs_of_models_and_endings_of_names():
    assert BaseTuner.get_model_config(toy()) == {"model_type": "custom"}
    assert BaseTuner.get_model_config(llama())["model_type"] == "llama"
    holder = nn.Module()
    holder.config = {"model_type": "mine"}
    assert BaseTuner.get_model_config(holder) == {"model_type": "mine"}
    assert _find_minimal_target_modules(["a.b", "a.c"], ["x.a.b"]) == {"a.b", "c"}
    for targets, others, said in (([], [], "list or set"), ("a", [], "list or set"), (["a", ""], [], "empty string"),
                                  (["a.b"], ["a.b"], "common elements")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            _find_minimal_target_modules(targets, others)


def test_an_injected_adapter_that_is_deleted_again_is_none_and_says_who_is_active():
    model = toy()
    for name in ("one", "two"):
        inject_adapter_in_model(LoraConfig(target_modules=["up"]), model, name)
    assert delete_adapter(model, "one", "lora_") == ["two"]
    assert delete_adapter(model, "one", "lora_") == ["two"]
    assert delete_adapter(model, "two", "lora_") == []
