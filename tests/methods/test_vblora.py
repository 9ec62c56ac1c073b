"""VB-LoRA's factors pieced together in plain loops, its bank, and the small file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.methods.formulas import Matrix, add, product
from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import PeftModel, VBLoRAConfig, get_peft_model
from trimtab.files.store import load_peft_weights

ALL = ["q_proj", "v_proj", "down_proj"]


def piece(logits: list[float], bank: Matrix, k: int) -> list[float]:
    """The mixture of the k vectors with the largest logits."""
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    total = sum(math.exp(logits[i]) for i in best)
    return [sum(math.exp(logits[i]) / total * bank[i][c] for i in best) for c in range(len(bank[0]))]


def test_formula() -> None:
    model = adapted(VBLoRAConfig(target_modules=["point"], r=3, num_vectors=7, vector_length=2, topk=2), Points())
    layer = model.get_base_model().point
    bank = numbers(model.base_model.vblora_vector_bank["default"])
    a, b = numbers(layer.vblora_logits_A["default"]), numbers(layer.vblora_logits_B["default"])
    A = [[v for logits in row for v in piece(logits, bank, 2)] for row in a]
    B = [[piece(b[i][c], bank, 2)[j] for c in range(3)] for i in range(len(b)) for j in range(2)]
    same(merged(model, "point"), add(numbers(layer.base_layer.weight), product(B, A)))
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merging_changes_nothing(model, x)
    check_gradients(model, x)


class Points(torch.nn.Module):
    """A Linear whose sides are even."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.point(x))


def test_the_bank_is_kept_once_and_trained() -> None:
    model = get_peft_model(llama(), VBLoRAConfig(target_modules=ALL, num_vectors=9, vector_length=8))
    banks = [p for n, p in model.named_parameters() if "vector_bank" in n]
    assert [(tuple(p.shape), p.requires_grad) for p in banks] == [((9, 8), True)]
    model(tokens(vocabulary=64)).logits.square().sum().backward()
    assert banks[0].grad.abs().sum() > 0
    model.add_adapter("b", VBLoRAConfig(target_modules=ALL, num_vectors=5, vector_length=4))
    assert model.base_model.vblora_vector_bank["b"].shape == (5, 4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_small_file(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    fields = {"target_modules": ALL, "num_vectors": 30, "vector_length": 8, "topk": 3}
    sizes = {}
    for few in (False, True):
        torch.manual_seed(3)
        model = adapted(VBLoRAConfig(**fields, save_only_topk_weights=few), llama())
        model.save_pretrained(tmp_path / str(few))
        tensors = load_peft_weights(tmp_path / str(few))
        sizes[few] = sum(t.nbytes for k, t in tensors.items() if "logits" in k)
    assert sizes[True] < sizes[False] / 10
    assert {t.dtype for k, t in tensors.items() if "indices" in k} == {torch.uint8}
    x = tokens(vocabulary=64)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path / "True", low_cpu_mem_usage=low_cpu_mem_usage)
    same(loaded(x).logits, model(x).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load_peft_weights(tmp_path / "again")
    for key, tensor in tensors.items():
        torch.testing.assert_close(again[key], tensor)
    with pytest.raises(RuntimeError, match="Ensure training was not resumed from a `save_only_topk_weights` model"):
        loaded.train()(x)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="`in_features` 12 must be divisible by `vector_length` 5"):
        adapted(VBLoRAConfig(target_modules=["linear"], num_vectors=5, vector_length=5))
    with pytest.raises(ValueError, match="the bank has only 2 vectors"):
        adapted(VBLoRAConfig(target_modules=["linear"], num_vectors=2, topk=3))
