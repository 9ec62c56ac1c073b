"""Base, adapter and null adapter: the null adapter has the adapter's norms, and nothing is left behind."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import assert_untouched, llama, snapshot
from trimtab import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from trimtab.train.compare import PROMPTS, compare
from trimtab.train.data import encode_rows
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.null import add_null_adapter, delta_norms

ROWS = [{"prompt": f"Is {i} even?", "completion": "yn"[i % 2]} for i in range(6)]


def adapted(model, config, seed=1, size=0.3):
    torch.manual_seed(seed)
    model = get_peft_model(model, config, "mine")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=size)
    return model.eval()


def lora(**more):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})


def changes(model, name):
    """{path: dW} by merging."""
    base, paths = model.get_base_model(), model.base_model.targeted_module_names
    before = {p: base.get_submodule(p).base_layer.weight.clone() for p in paths}
    model.merge_adapter([name])
    after = {p: base.get_submodule(p).base_layer.weight.clone() for p in paths}
    model.unmerge_adapter()
    return {p: (after[p] - before[p]).double() for p in paths}


CONFIGS = {
    "plain": lora(lora_alpha=10),
    "pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 30}),
    "rslora": lora(use_rslora=True),
    "head and embedding": lora(target_modules=["embed_tokens", "lm_head", "up_proj"]),
    "DoRA": lora(use_dora=True, target_modules=["q_proj", "v_proj"]),
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_null_adapter_has_the_norms_of_the_adapter_and_no_more(case) -> None:
    model = adapted(llama(), CONFIGS[case])
    add_null_adapter(model, "mine", "null")
    mine, null = changes(model, "mine"), changes(model, "null")
    assert {p for p, d in null.items() if d.norm() > 0} == {p for p, d in mine.items() if d.norm() > 0}
    for path, delta in mine.items():
        assert float(null[path].norm()) == pytest.approx(float(delta.norm()), rel=1e-3), path
        if delta.norm() > 0 and case != "IA3":
            assert torch.linalg.matrix_rank(null[path], tol=1e-3) <= 8
            assert abs(float((delta * null[path]).sum() / delta.norm() ** 2)) < 0.5
    assert model.active_adapters == ["mine"]


def test_norms_by_factors_and_by_merging_agree() -> None:
    from trimtab.train.null import _by_merging

    model = adapted(llama(), lora())
    by_factors, by_merging = delta_norms(model, "mine"), _by_merging(model, "mine")
    assert by_factors.keys() == by_merging.keys()
    for path, d in by_factors.items():
        assert d.norm == pytest.approx(by_merging[path].norm, rel=1e-4)


def test_a_seed_draws_the_same_null_adapter() -> None:
    deltas = []
    for seed in (0, 0, 1):
        model = adapted(llama(), lora(target_modules=["q_proj"]))
        add_null_adapter(model, "mine", "null", seed)
        deltas.append(changes(model, "null")["model.layers.0.self_attn.q_proj"])
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.allclose(deltas[0], deltas[2])


def test_a_comparison_whole(model, tokenizer) -> None:
    model = adapted(model, lora())
    before = snapshot(model)
    examples = encode_rows(ROWS, tokenizer)
    found = compare(model, tokenizer, "mine", ["Hello", "Good day"], examples, max_new_tokens=6)
    assert found.names == ["base", "mine", "null"]
    assert [p.prompt for p in found.prompts] == ["Hello", "Good day"]
    assert found.losses["mine"].rows == evaluate_loss(model, examples).rows
    with model.disable_adapter():
        assert found.losses["base"].rows == evaluate_loss(model, examples).rows
    assert found.losses["base"].loss != found.losses["null"].loss != found.losses["mine"].loss
    assert found.norm == pytest.approx(
        math.hypot(*(float(d.norm()) for d in changes(model, "mine").values())), rel=1e-4
    )
    for p in found.prompts:
        base, mine = p.sides["base"], p.sides["mine"]
        assert (base.diverges, base.shift, base.divergence) == (None, 0.0, 0.0)
        assert mine.shift > 0
        assert mine.divergence > 0
        if mine.diverges is not None:
            assert mine.ids[: mine.diverges] == base.ids[: mine.diverges]
            assert mine.ids[mine.diverges : mine.diverges + 1] != base.ids[mine.diverges : mine.diverges + 1]
    assert found.changes_nothing is None
    assert not found.broken
    assert list(model.peft_config) == ["mine"]
    assert_untouched(model, before)


def test_prompts_come_from_the_rows_or_are_common_ones(model, tokenizer) -> None:
    model = adapted(model, lora())
    found = compare(model, tokenizer, "mine", examples=encode_rows(ROWS, tokenizer), max_new_tokens=2)
    assert len(found.prompts) == 3
    assert "Is 0 even?" in found.prompts[0].prompt
    assert [p.prompt for p in compare(model, tokenizer, "mine", max_new_tokens=2).prompts] == list(PROMPTS)
    texts = compare(model, tokenizer, "mine", examples=encode_rows([{"text": "some text"}], tokenizer))
    assert not texts.prompts
    assert texts.changes_nothing is None


def test_an_adapter_that_starts_changes_nothing(model, tokenizer) -> None:
    model = adapted(model, lora(), size=0.0)
    found = compare(model, tokenizer, "mine", examples=encode_rows(ROWS, tokenizer), max_new_tokens=2)
    assert found.changes_nothing == "the norm of its delta is 0"
    assert found.norm == 0
    assert found.names[-1] == "null"


def test_a_prompt_has_no_null_adapter_and_says_why(model, tokenizer) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    found = compare(adapted(model, config), tokenizer, "mine", ["Hello"], max_new_tokens=2)
    assert (found.names, found.norm) == (["base", "mine"], None)
    assert "changes no weight" in found.no_null
    assert found.changes_nothing is None


def test_norms_have_no_null_adapter(model, tokenizer) -> None:
    found = compare(
        adapted(model, LNTuningConfig(task_type="CAUSAL_LM")), tokenizer, "mine", ["Hello"], max_new_tokens=2
    )
    assert found.names == ["base", "mine"]
    assert found.no_null


def test_without_the_null_adapter(model, tokenizer) -> None:
    found = compare(adapted(model, lora()), tokenizer, "mine", ["Hello"], null=False, max_new_tokens=2)
    assert found.names == ["base", "mine"]
    assert found.norm > 0


def test_nan_is_broken_and_not_nothing(model, tokenizer) -> None:
    model = adapted(model, lora())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    found = compare(model, tokenizer, "mine", ["Hello"], max_new_tokens=2)
    assert found.broken
    assert found.changes_nothing is None
