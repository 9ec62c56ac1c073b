"""What a model says of its layers, and helpers around it, as PEFT's programs read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models import llama
from trimtab import LoraConfig, get_layer_status, get_model_status, get_peft_model, prepare_model_for_kbit_training


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first[0] @ self.second[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = Experts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x))


def test_adapted_parameters_are_of_a_kind_of_their_own() -> None:
    config = LoraConfig(r=2, target_modules=["out"], target_parameters=["experts.first", "experts.second"])
    model = get_peft_model(Net(), config)
    rows = [(row.name, row.module_type) for row in get_layer_status(model)]
    assert rows == [("model.experts", "lora.ParamWrapper"), ("model.experts.base_layer", "lora.ParamWrapper"),
                    ("model.out", "lora.Linear")]  # fmt: skip
    assert get_model_status(model).quantization_backend is None


def test_preparing_takes_all_of_pefts_arguments() -> None:
    net = prepare_model_for_kbit_training(Net(), use_gradient_checkpointing=False, auto_clear_cache=False)
    assert not any(p.requires_grad for p in net.parameters())


def test_preparing_checkpoints_quantised_models_only() -> None:
    assert not prepare_model_for_kbit_training(llama()).is_gradient_checkpointing
