"""Losses against the model's own, accuracies against plain loops, generation in the middle of training."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch

from trimtab import LoraConfig, PromptTuningConfig, get_peft_model
from trimtab.errors import ConfigError, DataError
from trimtab.train.data import encode_rows
from trimtab.train.evaluate import by_length, evaluate_generate, evaluate_loss, evaluate_rows, examples_of
from trimtab.train.generate import as_fits, complete, references

ROWS = [{"prompt": f"{i} + {i} =", "completion": str(2 * i) * (1 + i % 3)} for i in range(9)]
LABELS = [{"prompt": f"Is {i} even?", "completion": "yn"[i % 2]} for i in range(12)]


@pytest.fixture
def adapted(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).eval()


@torch.no_grad()
def own_loss(model, example):
    ids, labels = torch.tensor([example.ids]), torch.tensor([example.labels])
    return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_the_loss_is_the_models_own(adapted, tokenizer, batch_tokens) -> None:
    examples = encode_rows(ROWS, tokenizer)
    found = evaluate_loss(adapted, examples, batch_tokens=batch_tokens)
    losses, trained = [own_loss(adapted, e) for e in examples], [e.trained for e in examples]
    assert found.rows == pytest.approx(losses, rel=1e-5)
    assert found.loss == pytest.approx(sum(x * n for x, n in zip(losses, trained)) / sum(trained), rel=1e-5)
    assert found.tokens == sum(trained)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.accuracy is None


def test_text_and_conversations_with_several_answers(adapted, tokenizer) -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e"))
    ]
    examples = encode_rows([{"text": "Some plain words."}, {"messages": turns}], tokenizer)
    found = evaluate_loss(adapted, examples)
    assert found.rows == pytest.approx([own_loss(adapted, e) for e in examples], rel=1e-5)


def test_a_prompt_in_front_shifts_nothing(model, tokenizer) -> None:
    adapted = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    examples = encode_rows(ROWS, tokenizer)
    found = evaluate_loss(adapted, examples)
    assert found.rows == pytest.approx([own_loss(adapted, e) for e in examples], rel=1e-5)


def test_labels_of_one_token_are_scored_by_one_forward(adapted, tokenizer) -> None:
    examples = encode_rows(LABELS, tokenizer)
    found = evaluate_loss(adapted, examples, special=tokenizer.all_special_ids)
    said, among = [], []
    choices = tokenizer("yn").input_ids
    for e in examples:
        with torch.no_grad():
            scores = adapted(input_ids=torch.tensor([e.ids])).logits[0, e.prompt_length - 1]
        said.append(int(scores.argmax()) == e.ids[e.prompt_length])
        among.append(max(choices, key=lambda c: float(scores[c])) == e.ids[e.prompt_length])
    assert found.accuracy == sum(said) / 12
    assert found.among_labels == sum(among) / 12
    assert (found.commonest, found.labels) == (0.5, 2)


def test_next_token_is_the_share_of_greedy_choices(adapted, tokenizer) -> None:
    examples = encode_rows(ROWS, tokenizer)
    right = total = 0
    for e in examples:
        with torch.no_grad():
            own = adapted(input_ids=torch.tensor([e.ids])).logits[0].argmax(-1).tolist()
        right += sum(own[i] == e.labels[i + 1] for i in range(len(e.ids) - 1) if e.labels[i + 1] != -100)
        total += e.trained
    assert evaluate_loss(adapted, examples).next_token == pytest.approx(right / total)


def test_answers_are_those_of_generation_and_metrics_of_them(adapted, tokenizer) -> None:
    examples = encode_rows(ROWS, tokenizer)
    found = evaluate_generate(adapted, tokenizer, examples, max_new_tokens=6, batch_size=2)
    assert found.answers == complete(adapted, tokenizer, examples, 6)
    assert found.expected == references(tokenizer, examples) == [r["completion"] for r in ROWS]
    assert found.metrics == {"exact_match": sum(a == b for a, b in zip(found.answers, found.expected)) / 9}

    def longest(answers, expected):
        return max(map(len, answers))

    own = evaluate_generate(adapted, tokenizer, examples, metrics=["json_valid", longest], max_new_tokens=6)
    assert own.metrics.keys() == {"json_valid", "longest"}


def test_in_the_middle_of_training_nothing_is_changed(adapted, tokenizer) -> None:
    adapted.set_adapter("default")
    adapted.train()
    adapted.gradient_checkpointing_enable()
    examples = encode_rows(ROWS, tokenizer)
    weights = {n: p.clone() for n, p in adapted.named_parameters()}
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    alone = evaluate_generate(adapted, tokenizer, examples, max_new_tokens=4)
    evaluate_loss(adapted, examples)
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), state)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None and torch.equal(p, weights[n]) for n, p in adapted.named_parameters())
    assert alone.answers == complete(adapted.eval(), tokenizer, examples, 4)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    done: list[list[int]] = []

    def work(rows):
        if len(rows) > 3:
            raise torch.cuda.OutOfMemoryError
        done.append(rows)

    as_fits(work, list(range(10)))
    assert list(chain(*done)) == list(range(10))

    def never(rows):
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError):
        as_fits(never, [1])


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [5, 1, 30, 7, 7, 2]
    batches = by_length(lengths, 16)
    assert sorted(chain(*batches)) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 16 for b in batches)
    assert by_length([], 16) == []


# ---------------------------------------------------------------------- what is chosen
def test_what_is_measured_follows_from_the_rows(adapted, tokenizer) -> None:
    labels = evaluate_rows(adapted, tokenizer, encode_rows(LABELS, tokenizer))
    assert labels.answers is None
    assert labels.loss.accuracy is not None
    text = evaluate_rows(adapted, tokenizer, encode_rows([{"text": "abc"}], tokenizer))
    assert (text.answers, text.why) == (None, "plain text has no answers")
    objects = [{"prompt": "go", "completion": json.dumps({"a": i})} for i in range(3)]
    found = evaluate_rows(adapted, tokenizer, encode_rows(objects, tokenizer), max_new_tokens=3)
    assert found.answers.metrics.keys() == {"exact_match", "field_f1", "json_valid"}
    long = evaluate_rows(adapted, tokenizer, encode_rows([{"prompt": "a", "completion": "b" * 300}], tokenizer, 400))
    assert long.answers is None
    assert "not generated" in long.why


def test_metrics_as_asked_for(adapted, tokenizer) -> None:
    examples = encode_rows(LABELS, tokenizer)
    assert evaluate_rows(adapted, tokenizer, examples, ["loss"]).answers is None
    found = evaluate_rows(adapted, tokenizer, examples, ["exact_match"], max_new_tokens=2)
    assert found.answers.metrics.keys() == {"exact_match"}
    with pytest.raises(ConfigError, match="no metric 'bleu'"):
        evaluate_rows(adapted, tokenizer, examples, ["bleu"])
    with pytest.raises(DataError, match="one token"):
        evaluate_rows(adapted, tokenizer, encode_rows(ROWS, tokenizer), ["accuracy"])
    with pytest.raises(DataError, match="no prompt to answer"):
        evaluate_rows(adapted, tokenizer, encode_rows([{"text": "abc"}], tokenizer), ["exact_match"])


def test_no_rows_no_file(adapted, tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate_loss(adapted, [])
    with pytest.raises(DataError, match="no rows"):
        evaluate_generate(adapted, tokenizer, [])
    with pytest.raises(DataError, match="no file"):
        examples_of(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        examples_of(tmp_path / "empty.jsonl", tokenizer)


def test_a_broken_model_has_no_loss(adapted, tokenizer) -> None:
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n).fill_(math.nan)
    assert math.isnan(evaluate_loss(adapted, encode_rows(ROWS, tokenizer)).loss)
