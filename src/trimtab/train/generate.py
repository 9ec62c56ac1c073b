"""Answers to many prompts at once, and how many are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.train.data import IGNORE, Example

__all__ = ["complete", "exact_match", "generate_ids", "references"]


@torch.no_grad()
def generate_ids(model: nn.Module, prompts: Sequence[list[int]], pad_id: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of token prompts in one batch, cut after the first end token; dropout off."""
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    # Padded on the left: every prompt ends where its continuation begins.
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, T)
    was_training = model.training
    model.eval()
    try:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad_id}
        generate: Any = model.generate
        out = generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
    finally:
        model.train(was_training)
    stops = stop_ids(model)
    return [row[: next((i + 1 for i, id in enumerate(row) if id in stops), len(row))] for row in out]


def stop_ids(model: nn.Module) -> set[int]:
    """The tokens at which the model's generation ends."""
    config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
    eos = getattr(config, "eos_token_id", None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def complete(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, batch_size: int = 100
) -> list[str]:
    """The model's greedy answer to each example's prompt, as text. Prompts of like length share a batch."""
    answers = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt_length)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        prompts = [examples[i].ids[: examples[i].prompt_length] for i in part]
        for i, ids in zip(part, generate_ids(model, prompts, pad_id, max_new_tokens)):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def references(tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """What each example's last answer should be, as text."""
    answers = ([id for id in e.labels[e.prompt_length :] if id != IGNORE] for e in examples)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal what was expected, character for character."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)
