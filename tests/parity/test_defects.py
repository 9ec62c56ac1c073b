"""Defects of PEFT 0.21.2 that have no better place among the tests: each shows its answer and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import trimtab
from tests.parity.models import build
from tests.parity.pairs import BOTH, adapt, near, quiet, run, spoken

IDS = torch.tensor([[4, 9, 11, 7, 30]])


class Kinds(nn.Module):
    """A table, a convolution and a linear layer in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.linear = nn.Embedding(64, 32), nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.conv(self.embed(ids).mT).mT)  # type: ignore[no-any-return]


def test_the_pair_of_tied_layers_is_one_on_half_precision_bases() -> None:
    """PEFT's are two parameters, which its cast to fp32 parts: one step of training leaves them different."""
    for library, count in ((trimtab, 2), (peft, 4)):
        config = library.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
        model = quiet(library.get_peft_model, build("llama_tied", torch.bfloat16), config)
        pair = [p for p in model.parameters() if p.requires_grad]
        assert len({p.data_ptr() for p in pair}) == len(pair) == count
        assert {p.dtype for p in pair} == {torch.float32}


@pytest.mark.parametrize("target", ["embed", "conv"])
def test_loftq_of_tables_and_convolutions(target: str) -> None:
    """They start plainly: there is no quantised format for them."""
    fields = {"init_lora_weights": "loftq", "target_modules": [target], "r": 4}
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        quiet(peft.get_peft_model, Kinds(), peft.LoraConfig(**fields, loftq_config=peft.LoftQConfig()))
    model = quiet(trimtab.get_peft_model, Kinds(), trimtab.LoraConfig(**fields, loftq_config=trimtab.LoftQConfig()))
    near(model(IDS), Kinds()(IDS))


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).T


def test_a_parameter_that_is_computed_is_not_merged_in_silence() -> None:
    """PEFT merges into a parameter that nothing reads: merged, the adapter is gone. Ours says so."""
    for library in BOTH:
        base = Kinds()
        parametrize.register_parametrization(base.linear, "weight", Symmetric())
        wanted = base(IDS)
        config = library.LoraConfig(target_modules=["linear"], init_lora_weights=False)
        model = quiet(library.get_peft_model, base, config).eval()
        assert (model(IDS) - wanted).norm() > 0.1
        if library is trimtab:
            with pytest.raises(trimtab.errors.ReadOnlyWeight, match="computed from others"):
                model.merge_adapter()
            assert (model(IDS) - wanted).norm() > 0.1
        else:
            quiet(model.merge_adapter)
            near(model(IDS), wanted)


def test_a_parameter_that_is_computed_is_none_of_target_parameters() -> None:
    base = Kinds()
    parametrize.register_parametrization(base.linear, "weight", Symmetric())
    names = set(base.state_dict())
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        quiet(trimtab.get_peft_model, base, trimtab.LoraConfig(target_modules=[], target_parameters=["linear.weight"]))
    assert set(base.state_dict()) == names


def test_saving_a_bias_of_lora_warns_of_nothing(tmp_path: Path) -> None:
    """PEFT takes the bias for a tensor that ZeRO-3 has left empty."""
    said = [spoken(adapt(library, "llama", {"lora_bias": True}).save_pretrained, str(tmp_path)) for library in BOTH]
    assert not said[0]
    assert any("invalid shape" in text for text in said[1])


def test_all_linear_with_dropout_on_experts_is_loaded_for_inference() -> None:
    fields: dict[str, Any] = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.1, "inference_mode": True}
    with pytest.raises(ValueError, match="lora_dropout"):
        adapt(peft, "mixtral", fields)
    model = adapt(trimtab, "mixtral", fields).eval()
    assert any(".experts." in name for name, _ in model.named_parameters() if "lora_" in name)
    near(run(model, "mixtral"), run(build("mixtral").eval(), "mixtral"), 2e-5)


def test_whether_an_adapter_acts() -> None:
    """PEFT says True where none is active."""
    for library, wanted in ((trimtab, [True, False, False]), (peft, [True, False, True])):
        model = quiet(library.get_peft_model, Kinds(), library.LoraConfig(target_modules=["linear"]))
        said = [model.has_active_enabled_adapter]
        with model.disable_adapter():
            said.append(model.has_active_enabled_adapter)
        model.base_model.set_adapter([])
        assert [*said, model.has_active_enabled_adapter] == wanted


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_a_stray_loftq_config_hides_no_default(start: str) -> None:
    for library, given in ((trimtab, True), (peft, False)):
        config = quiet(library.LoraConfig, init_lora_weights=start, loftq_config={"loftq_bits": 4})
        assert (getattr(config, f"{start}_config") is not None) == given
