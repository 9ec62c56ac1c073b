"""Factors off a file: norms and products are those of the dense deltas that the library itself forms."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import gpt2, llama, toy
from trimtab import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from trimtab.files.factors import Factors, read_factors


def random_factors(seed: int, r: int, out: int, into: int, scale: float, stack: tuple[int, ...] = ()) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(*stack, r, into, generator=draw, dtype=torch.float64)
    B = torch.randn(*stack, out, r, generator=draw, dtype=torch.float64)
    return Factors(A, B, scale)


def dense(f: Factors) -> torch.Tensor:
    return f.scale * (f.B @ f.A)


sizes = st.integers(1, 9)


@given(st.integers(0, 10**6), sizes, sizes, sizes, sizes, st.floats(-4, 4), st.sampled_from([(), (3,)]))
def test_products_and_norms_are_the_dense_ones(seed, r, q, out, into, scale, stack) -> None:
    a, b = random_factors(seed, r, out, into, scale, stack), random_factors(seed + 1, q, out, into, 1.5, stack)
    assert a.norm() == pytest.approx(float(dense(a).norm()), rel=1e-9, abs=1e-12)
    assert a.inner(b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-9, abs=1e-9)
    assert a.shape == tuple(dense(a).shape)


def adapted(model, config):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.2)
    return model


CASES = {
    "linear": (llama, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")),
    "rslora": (llama, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])),
    "patterns": (
        llama,
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5},
                   alpha_pattern={"0.mlp.down_proj": 3}),
    ),
    "embedding and convolution": (toy, LoraConfig(r=2, target_modules=["embed", "conv", "up", "down"])),
    "Conv1D": (gpt2, LoraConfig(r=2, target_modules=["c_attn"])),
    "AdaLoRA": (llama, AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj", "v_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_what_a_merge_changes(case) -> None:
    make, config = CASES[case]
    model = adapted(make().double(), config)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    factors, faults = read_factors(model.peft_config["default"].to_json(), tensors)
    assert not faults
    before = {n: m.weight.clone() for n in factors if (m := model.get_base_model().get_submodule(n).base_layer)}
    model.merge_adapter()
    assert factors.keys() == {*model.base_model.targeted_module_names}
    for path, f in factors.items():
        change = model.get_base_model().get_submodule(path).base_layer.weight - before[path]
        assert f.norm() == pytest.approx(float(change.norm()), rel=1e-4), path


def test_experts_in_one_tensor_are_taken_apart() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = adapted(model, config)
    factors, faults = read_factors(model.peft_config["default"].to_json(), get_peft_model_state_dict(model))
    assert not faults
    base = model.get_base_model()
    experts = base.model.layers[0].mlp.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    before = {n: getattr(experts, n).clone() for n in ("gate_up_proj", "down_proj")}
    model.merge_adapter()
    for name, old in before.items():
        f = factors[f"model.layers.0.mlp.experts.{name}"]
        assert len(f.A) == 3
        assert f.norm() == pytest.approx(float((getattr(experts, name) - old).norm()), rel=1e-3), name


def test_what_does_not_belong_together_is_named() -> None:
    A, B = torch.ones(2, 4), torch.ones(3, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    lonely = {"base_model.model.a.lora_A.weight": A, "base_model.model.b.lora_B.weight": B}
    factors, faults = read_factors(config, lonely)
    assert not factors
    assert len(faults) == 2
    assert "a.lora_A.weight has no B" in faults[0]
    assert "b.lora_B.weight has no A" in faults[1]
    pair = {"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": torch.ones(3, 5)}
    assert "2 rows" in read_factors(config, pair)[1][0]
    pair = {"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": B}
    factors, faults = read_factors({**config, "r": 8}, pair)
    assert "the config says rank 8, the file has 2" in faults[0]
    assert factors["a"].norm() == pytest.approx(math.sqrt(12 * 4) / 4)
