"""Packed examples learn what they would alone, and a model that mixes them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.models import gpt2, llama
from trimtab.errors import DataError, TrainError
from trimtab.train.data import Example, check_packing, collate, collate_packed, pack
from trimtab.train.packing import token_losses

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def mistral(**changes: Any) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, **changes)).eval()


def gemma3(**changes: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=kinds, query_pre_attn_scalar=4, **changes)
    return Gemma3ForCausalLM(config).eval()


def mamba() -> MambaForCausalLM:
    """Its state runs on from one example into the next."""
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()


MODELS = {"llama": lambda **c: llama(initializer_range=0.3, **c), "mistral": mistral, "gemma3": gemma3, "gpt2": gpt2}


def example(*ids: int, prompt: int = 2) -> Example:
    return Example(list(ids), [-100] * prompt + list(ids[prompt:]), prompt)


def draw(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [example(*torch.randint(3, 64, (n,), generator=generator).tolist(), prompt=n // 3) for n in lengths]


# --- bins ---


@given(st.lists(st.integers(1, 30), max_size=80))
def test_bins_hold_every_example_once_and_are_full(lengths) -> None:
    examples = [Example([5] * n, [5] * n, 0) for n in lengths]
    bins = pack(examples, 30)
    assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in bin) for bin in bins)
    assert all(load <= 30 for load in loads)
    assert bins == pack(examples, 30)
    if len(loads) > 1:
        assert loads[0] + loads[1] > 30  # no two would fit into one


def test_each_goes_where_it_leaves_the_least_room() -> None:
    examples = [Example([5] * n, [5] * n, 0) for n in (4, 6, 7, 3)]
    assert pack(examples, 10) == [[2, 3], [1, 0]]


def test_an_example_that_fits_nowhere_is_named() -> None:
    examples = [Example([5] * 12, [5] * 12, 0, row=6), Example([5], [5], 0)]
    with pytest.raises(DataError, match=r"1 example\(s\) do not fit into 10 tokens; row 7 has 12"):
        pack(examples, 10)


# --- batches ---


def test_a_packed_batch() -> None:
    batch = collate_packed([Example([5, 6, 7], [5, 6, 7], 0), example(8, 9, prompt=1)])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 6, 7, -100, 9]],
        "seq_lengths": [3, 2],
    }
    assert "attention_mask" not in batch  # with one, transformers lets examples see each other


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_each_example_alone(name, attention) -> None:
    model = MODELS[name](attn_implementation=attention)
    examples = draw([9, 5, 12, 2, 4])
    packed = token_losses(model, collate_packed(examples))
    assert len(packed) == sum(e.trained for e in examples)
    for alone in (
        torch.cat([token_losses(model, collate([e])) for e in examples]),
        token_losses(model, collate(examples)),
    ):
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    check_packing(model, examples)


def test_gradients_are_those_of_a_padded_batch() -> None:
    model, examples = mistral(), draw([9, 5, 12])
    for batch in (collate(examples), collate_packed(examples)):
        batch.pop("seq_lengths", None)
        model(**batch, use_cache=False).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**collate(examples), use_cache=False).loss.backward()
    for both, once in zip(gradients, model.parameters()):
        torch.testing.assert_close(both, 2 * once.grad, atol=1e-5, rtol=1e-4)


# --- the check ---


class Deaf(nn.Module):
    """A model whose forward lets the position ids fall under the table."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama(initializer_range=0.3)

    def forward(self, input_ids: Any, position_ids: Any, **rest: Any) -> Any:
        return self.inner(input_ids, **rest)


@pytest.mark.parametrize("model", [mamba, Deaf], ids=["mamba", "ignores positions"])
def test_a_model_that_mixes_examples_is_refused_with_the_difference(model) -> None:
    model = model().train()
    with pytest.raises(
        TrainError, match=r"see each other.*is \d+\.\d+ packed and \d+\.\d+ alone.*Train without packing"
    ):
        check_packing(model, draw([9, 5, 12]))
    assert model.training


def test_a_model_that_cannot_take_positions_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            return self.inner(input_ids)

    with pytest.raises(TrainError, match="cannot be trained on packed sequences"):
        check_packing(Plain(), draw([5, 6]))


def test_low_precision_is_no_mixture_and_one_example_needs_no_check() -> None:
    check_packing(llama(initializer_range=0.3).bfloat16(), draw([9, 5, 12]))
    check_packing(mamba(), draw([9]))
    with pytest.raises(TrainError, match="see each other"):
        check_packing(Deaf().bfloat16(), draw([9, 5, 12]))


def test_an_adapted_model_is_checked_as_it_is() -> None:
    from trimtab import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    check_packing(model, draw([9, 5, 12]))
