"""Answers: alone as in a batch, with several adapters at once as one after the other, streamed as whole."""

from __future__ import annotations

import pytest
import torch

from trimtab import LoraConfig, PromptTuningConfig, get_peft_model
from trimtab.shell.opening import using
from trimtab.train.generate import answer, generate_ids, mixes, sampling_of, stream
from trimtab.train.prompts import encode_prompt

PROMPTS = ["Hello", "What is 2 + 2?", "A rather longer prompt than the others, to be padded for", "x"]


@pytest.fixture
def adapted(model):
    torch.manual_seed(1)
    for name in ("one", "two"):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config, "one") if name == "one" else (model.add_adapter(name, config), model)[1]
    return model.eval()


def alone(model, tokenizer, prompt, adapter, length=8):
    with using(model, adapter):
        (ids,) = generate_ids(model, [encode_prompt(tokenizer, prompt)], 0, length)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_mixed_batch_answers_as_each_alone(adapted, tokenizer, batch_size) -> None:
    names = ["base", "two", "one"]
    assert mixes(adapted, names)
    found = answer(adapted, tokenizer, PROMPTS, names, max_new_tokens=8, batch_size=batch_size)
    assert [(a.prompt, a.adapter) for a in found] == [(p, n) for p in PROMPTS for n in names]
    assert [a.text for a in found] == [alone(adapted, tokenizer, a.prompt, a.adapter) for a in found]
    assert len({a.text for a in found}) > 4
    assert adapted.active_adapters == ["one"]


def test_prompts_in_front_answer_one_after_the_other(adapted, tokenizer) -> None:
    adapted.add_adapter("soft", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    names = ["base", "soft", "one"]
    assert not mixes(adapted, names)
    found = answer(adapted, tokenizer, PROMPTS, names, max_new_tokens=6)
    assert [a.adapter for a in found] == names * len(PROMPTS)
    assert [a.text for a in found if a.adapter == "one"] == [
        a.text for a in answer(adapted, tokenizer, PROMPTS, ["one"], max_new_tokens=6)
    ]


def test_no_adapters_named_means_those_that_are_active(adapted, tokenizer) -> None:
    (found,) = answer(adapted, tokenizer, ["Hello"], max_new_tokens=8)
    assert (found.adapter, found.text) == ("one", alone(adapted, tokenizer, "Hello", "one"))
    (found,) = answer(adapted.unload(), tokenizer, ["Hello"], max_new_tokens=8)
    assert found.adapter == "base"


def test_a_stream_is_the_answer_in_pieces(adapted, tokenizer) -> None:
    pieces: list[str] = []
    found = stream(adapted, tokenizer, "Hello", pieces.append, "two", max_new_tokens=12)
    assert "".join(pieces).strip() == found.text == alone(adapted, tokenizer, "Hello", "two", 12)
    assert found.adapter == "two"


def test_what_write_raises_ends_the_stream(adapted, tokenizer) -> None:
    def write(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(adapted, tokenizer, "Hello", write, "two", max_new_tokens=12)
    assert adapted.active_adapters == ["one"]


def test_how_an_answer_ended(adapted, tokenizer) -> None:
    cut = stream(adapted, tokenizer, "Hello", lambda piece: None, max_new_tokens=1)
    assert (cut.finish, len(cut.ids)) == ("length", 1)
    adapted.generation_config.eos_token_id = cut.ids[0]
    ended = stream(adapted, tokenizer, "Hello", lambda piece: None, max_new_tokens=5)
    assert (ended.finish, len(ended.ids)) == ("stop", 1)


def test_sampling_is_greedy_at_0_and_repeats_by_its_seed(adapted, tokenizer) -> None:
    assert sampling_of(0.0) == {}
    draws = [answer(adapted, tokenizer, ["Hello"], None, 8, **sampling_of(5.0, 1.0, seed))[0].ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
