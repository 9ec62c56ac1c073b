"""The capacity rule counted out, and the sketched spectrum of a gradient against the gradient itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.models import assert_untouched, gpt2, llama, mixtral, snapshot, toy
from trimtab import LoraConfig, estimate_ranks, get_peft_model, suggest_rank
from trimtab.errors import ConfigError
from trimtab.rank.suggest import config_of, skeleton

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


def smollm2() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(SMOLLM2)


# ---------------------------------------------------------------------- the size
def test_parameters_of_a_rank_as_everybody_counts_them() -> None:
    found = {s.name: s for s in suggest_rank(smollm2(), 1000).sets}
    assert {name: s.parameters for name, s in found.items()} == {
        "all-linear": 305_280, "mlp": 190_080, "attention": 115_200, "default": 57_600,
    }  # fmt: skip
    assert {name: s.layers for name, s in found.items()} == {
        "all-linear": 210, "mlp": 90, "attention": 120, "default": 60,
    }  # fmt: skip
    assert found["default"].modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("tokens", "least", "rank", "flat"),
    [(1, 1, 1, True), (305_280, 1, 1, True), (305_281, 2, 2, False), (1_300_000, 5, 8, False)],
)
def test_the_rule(tokens: int, least: int, rank: int, flat: bool) -> None:
    said = suggest_rank(smollm2(), tokens)
    assert said.sets[0].rank(tokens) == least
    assert (said.rank, said.flat, said.tokens) == (rank, flat, tokens)
    assert (said.alpha, said.learning_rate) == (32, 1e-3)


@pytest.mark.parametrize("build", [gpt2, llama, mixtral, toy])
def test_it_counts_what_a_lora_would_have(build: Any) -> None:
    model = build()
    before = snapshot(model)
    sets = {s.name: s for s in suggest_rank(model, 100).sets}
    assert_untouched(model, before)
    trained = get_peft_model(build(), LoraConfig(r=1, target_modules="all-linear")).get_nb_trainable_parameters()[0]
    assert sets["all-linear"].parameters == trained
    if "attention" in sets:
        assert sets["mlp"].parameters + sets["attention"].parameters == trained
    assert ("default" in sets) == (build is not toy)


def test_a_skeleton_has_no_storage_and_the_same_ties() -> None:
    model = gpt2()
    bare = skeleton(model)
    assert {p.device.type for p in (*bare.parameters(), *bare.buffers())} == {"meta"}
    assert [n for n, _ in bare.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert bare.lm_head.weight is bare.transformer.wte.weight


def test_no_tokens_are_no_task() -> None:
    with pytest.raises(ConfigError, match="there are 0"):
        suggest_rank(toy(), 0)


# ---------------------------------------------------------------------- the gradients
def batches(n: int = 3, vocabulary: int = 64) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        ids = torch.randint(3, vocabulary, (2, 7), generator=draw)
        found.append({"input_ids": ids, "labels": ids})
    return found


def gradients(model: Any, paths: list[str]) -> dict[str, torch.Tensor]:
    """The gradient of each layer's weight, summed over the batches, by backward alone."""
    model.requires_grad_(False)
    for path in paths:
        model.get_submodule(path).weight.requires_grad_(True)
    for batch in batches():
        model(**batch).loss.backward()
    return {p: model.get_submodule(p).weight.grad.double() for p in paths}


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("sketch", [24, 64])
def test_a_sketch_that_is_wide_enough_is_exact(build: Any, sketch: int) -> None:
    """The batches have 42 tokens: of a layer 16 wide, no gradient has a rank above 16."""
    found = estimate_ranks(build(), batches(), energy=0.9, sketch=sketch)
    exact = gradients(build(), [e.path for e in found])
    assert len(found) == {llama: 14, gpt2: 8}[build]
    for e in found:
        G = exact[e.path] if build is llama else exact[e.path].T
        S = torch.linalg.svdvals(G)
        assert e.shape == tuple(G.shape)
        assert e.norm == pytest.approx(float(G.norm()), rel=1e-3)
        assert e.values[:8] == pytest.approx(S[:8].tolist(), rel=1e-3, abs=1e-4 * float(S[0]))
        held = S.square().cumsum(0) / S.square().sum()
        assert e.rank == int((held < 0.9).sum()) + 1
        assert not e.capped


class Wide(nn.Module):
    """One wide layer whose gradient has a known spectrum: rows of the input and of the labels are orthogonal."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(200, 150, bias=False)
        self.values = values

    def forward(self, x: torch.Tensor) -> Any:
        n = len(self.values)
        left = torch.linalg.qr(torch.randn(150, n, generator=torch.Generator().manual_seed(1))).Q
        y = self.layer(x.requires_grad_())
        loss = (y * (left * self.values).T).sum()
        return type("Output", (), {"loss": loss})


def orthogonal(n: int) -> dict[str, torch.Tensor]:
    return {"x": torch.linalg.qr(torch.randn(200, n, generator=torch.Generator().manual_seed(2))).Q.T.contiguous()}


def test_a_narrow_sketch_is_near() -> None:
    """A spectrum that falls by a half each step, told from a sketch of a tenth of the width."""
    values = 0.5 ** torch.arange(40.0)
    exact = values.square().cumsum(0) / values.square().sum()
    for seed in range(5):
        (e,) = estimate_ranks(Wide(values), [orthogonal(40)], energy=0.99, sketch=16, seed=seed)
        assert e.values[:6] == pytest.approx(values[:6].tolist(), rel=0.01)
        assert e.norm == pytest.approx(float(values.norm()), rel=0.01)
        assert e.rank == int((exact < 0.99).sum()) + 1
        assert not e.capped


@pytest.mark.parametrize("n", [40, 120])
def test_more_than_the_sketch_can_tell_is_said(n: int) -> None:
    """A flat spectrum, the worst case: the sketch misses most of it, and knows how much."""
    for seed in range(5):
        (e,) = estimate_ranks(Wide(torch.ones(n)), [orthogonal(n)], energy=0.9, sketch=16, seed=seed)
        assert e.capped
        assert e.rank == 16
        assert e.norm == pytest.approx(n**0.5, rel=0.1)


def test_a_long_tail_counts() -> None:
    """Four strong directions over a floor that holds half of the energy: they are not taken for all of it."""
    values = torch.cat([torch.full((4,), 5.0), torch.ones(100)])
    for energy, rank in ((0.4, 4), (0.45, 4)):
        (e,) = estimate_ranks(Wide(values), [orthogonal(104)], energy=energy, sketch=16)
        assert (e.rank, e.capped) == (rank, False)
    assert estimate_ranks(Wide(values), [orthogonal(104)], energy=0.9, sketch=16)[0].capped


def test_the_model_stays_as_it_is() -> None:
    model = llama()
    model.train()
    model.lm_head.requires_grad_(False)
    before, trains = snapshot(model), [p.requires_grad for p in model.parameters()]
    found = estimate_ranks(model, batches(1), target_modules=["q_proj", "down_proj"])
    assert [e.path.rpartition(".")[2] for e in found] == ["q_proj", "down_proj"] * 2
    assert_untouched(model, before)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_of_ones_own_and_the_pattern() -> None:
    found = estimate_ranks(llama(), batches(2), 0.8, loss=lambda model, batch: 3 * model(**batch).loss)
    plain = estimate_ranks(llama(), batches(2), 0.8)
    assert [e.norm for e in found] == pytest.approx([3 * e.norm for e in plain], rel=1e-4)
    config = LoraConfig(target_modules="all-linear", **config_of(found))
    assert [config.resolve(e.path).r for e in found] == [e.rank for e in found]


def test_what_cannot_be_estimated() -> None:
    for arguments, message in (
        ({"batches": []}, "no batch"),
        ({"batches": batches(1), "energy": 0}, "share"),
        ({"batches": batches(1), "sketch": 0}, "sketch"),
        ({"batches": batches(1), "target_modules": ["embed_tokens"]}, "no linear layer"),
        ({"batches": batches(1), "loss": lambda m, b: torch.tensor(float("nan"))}, "loss of batch 1 is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            estimate_ranks(llama(), **arguments)
