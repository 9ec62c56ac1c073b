"""Mixed batches, several active adapters and generation: each row as PEFT computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.models import VOCABULARY
from tests.parity.pairs import BOTH, adapt, config_of, copy_state, near, pair, quiet, stir
from trimtab.errors import RouteError

BASE = "__base__"
PEFT_CANNOT = {"modules_to_save", "trainable_token_indices"}  # mix adapters that have these with ones that have not


def trio(name: str, fields: dict[str, Any], other: dict[str, Any]) -> list[Any]:
    """Both libraries' models with adapters default, b and c."""
    models = []
    for library in BOTH:
        model = adapt(library, name, fields)
        for extra in ("b", "c"):
            quiet(model.add_adapter, extra, config_of(library, other))
        for adapter in ("default", "b", "c"):
            model.set_adapter(adapter)
            stir(model)
        model.set_adapter("default")
        models.append(model.eval())
    copy_state(models[1], models[0])
    return models


def inputs(name: str, rows: int, length: int = 5) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    more = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"task_type": "CAUSAL_LM"}, {"r": 3, "target_modules": "all-linear"}),
    "gpt2": ("gpt2", {}, {"r": 3, "lora_alpha": 5}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM"}, {"r": 3}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"r": 3}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "r": 2}),
    "head_of_one": ("llama", {"modules_to_save": ["lm_head"]}, {"r": 2}),
    "classes": ("bert_seq", {"task_type": "SEQ_CLS"}, {"task_type": "SEQ_CLS", "r": 2}),
    "biased": ("llama", {"lora_bias": True}, {"lora_bias": True, "r": 2}),
    "tokens": ("llama", {"trainable_token_indices": [3, 4, 5, 6]}, {"r": 2}),
}
each = pytest.mark.parametrize(("name", "fields", "other"), CASES.values(), ids=CASES)

ROWS = [
    ["default", "b", "c", BASE],
    [BASE, BASE, "c", "b", "c", "default"],
    ["b"] * 3,
    [BASE, BASE],
]


@each
def test_rows(name: str, fields: dict[str, Any], other: dict[str, Any]) -> None:
    """The whole batch equals PEFT's, and each row what its adapter gives alone."""
    ours, theirs = trio(name, fields, other)
    for names in ROWS:
        batch = inputs(name, len(names))
        with torch.no_grad():
            mine = ours(**batch, adapter_names=names).logits
            if not PEFT_CANNOT & (fields.keys() - other.keys()):
                near(mine, theirs(**batch, adapter_names=names).logits)
            for row, adapter in enumerate(names):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                if adapter == BASE:
                    with ours.disable_adapter():
                        alone = ours(**one).logits
                else:
                    ours.set_adapter(adapter)
                    alone = ours(**one).logits
                near(mine[row : row + 1], alone)
            ours.set_adapter("default")


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"]}]
)
@pytest.mark.parametrize("active", [["default", "b"], ["c", "b"], ["b", "c", "default"]])
def test_several_active(fields: dict[str, Any], active: list[str]) -> None:
    """Adapters in use together."""
    ours, theirs = trio("llama", fields, {"r": 3})
    for model in (ours, theirs):
        quiet(model.base_model.set_adapter, active)
    batch = inputs("llama", 2)
    near(ours(**batch).logits, theirs(**batch).logits)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sequences": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "no_cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("arguments", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate(name: str, arguments: dict[str, Any]) -> None:
    """Tokens of one adapter, of a mixed batch, and of ids given by position."""
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    ours, theirs = trio(name, {"task_type": task}, {"task_type": task, "r": 3})
    batch = {k: v for k, v in inputs(name, 4).items() if k != "decoder_input_ids"}
    arguments = {**arguments, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    for names in (None, ["default", "b", BASE, "c"], [BASE] * 4):
        tokens = []
        # PEFT repeats the names for beams, but not for sequences that are sampled.
        for model in (ours, ours if names and arguments["do_sample"] else theirs):
            torch.manual_seed(0)
            tokens.append(quiet(model.generate, **batch, **arguments, **({"adapter_names": names} if names else {})))
        assert torch.equal(*tokens)
        if names is not None and not arguments["do_sample"]:  # each prompt as its adapter alone
            each = arguments.get("num_return_sequences", 1)
            for row, adapter in enumerate(names):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                if adapter == BASE:
                    with ours.disable_adapter():
                        alone = quiet(ours.generate, **one, **arguments)
                else:
                    ours.set_adapter(adapter)
                    alone = quiet(ours.generate, **one, **arguments)
                assert torch.equal(tokens[0][row * each : (row + 1) * each], alone)
            ours.set_adapter("default")
    quiet(ours.generate, batch["input_ids"], **arguments)


FAULTS: list[tuple[str, list[str], bool, str]] = [
    ("too few", ["b"], False, "Length of `adapter_names`"),
    ("too many", ["b"] * 5, False, "Length of `adapter_names`"),
    ("unknown", ["b", "nobody", BASE], False, "nobody"),
    ("training", ["b", "b", "b"], True, "training mode"),
]


@pytest.mark.parametrize(("why", "names", "train", "words"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults(why: str, names: list[str], train: bool, words: str) -> None:
    """What cannot be routed is a ValueError in both."""
    for model in trio("llama", {}, {"r": 2}):
        model.train(train)
        with pytest.raises((ValueError, RouteError), match=words):
            model(**inputs("llama", 3), adapter_names=names)


def test_merged_fault() -> None:
    """Merged adapters cannot be routed."""
    for model in trio("llama", {}, {"r": 2}):
        quiet(model.merge_adapter)
        with pytest.raises(ValueError, match="merged"):
            model(**inputs("llama", 3), adapter_names=["b"] * 3)


def test_gradient_checkpointing() -> None:
    """Gradients under checkpointing, both kinds, are those without."""
    for reentrant in (False, True):
        found = []
        for model in pair("llama", {"task_type": "CAUSAL_LM"}):
            plain = model(**inputs("llama", 2)).logits.square().mean()
            plain.backward()
            before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            quiet(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
            model(**inputs("llama", 2)).logits.square().mean().backward()
            after = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            assert before.keys() == after.keys() and before
            for key, gradient in before.items():
                near(after[key], gradient)
            found.append(after)
        for key, gradient in found[1].items():
            near(found[0][key], gradient)
