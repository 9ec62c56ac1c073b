"""What an adapter changes: answers, losses and logits of base and adapter side by side, and of a null adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import PeftError
from trimtab.shell.opening import BASE, NULL, using
from trimtab.train.data import Example
from trimtab.train.evaluate import LossResult, evaluate_loss, evaluating
from trimtab.train.generate import Counting, generate_ids, pad_token, silently
from trimtab.train.null import add_null_adapter, delta_norms
from trimtab.train.prompts import encode_prompt

POSITIONS = 128  # logits are compared at so many positions of a prompt, the last ones
PROMPTS = (  # where neither prompts nor rows are given
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three uses of a paper clip.",
)


@dataclass(frozen=True)
class Side:
    """One model's answer to one prompt."""

    text: str
    ids: list[int]
    diverges: int | None  # the first of its tokens that is not the base's, from 0; None: it says the same
    shift: float  # largest change of a logit over the prompt, from the base's
    divergence: float  # mean over the prompt of KL(base || this), in nats


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what each said: "base", the adapter's name, and "null" where there is one."""

    prompt: str
    sides: dict[str, Side]


@dataclass(frozen=True)
class Comparison:
    """What `trimtab compare` shows; every figure by name: "base", the adapter's, "null"."""

    adapter: str
    names: list[str]
    norm: float | None  # of all dW together; None where the method changes no weight
    prompts: list[Prompt]
    losses: dict[str, LossResult] = field(default_factory=dict)  # where there are rows
    no_null: str | None = None  # why there is no null adapter, or what it leaves out

    @property
    def broken(self) -> bool:
        """Whether the adapter's logits or losses are no numbers."""
        figures = [p.sides[self.adapter].shift for p in self.prompts]
        figures += [self.losses[self.adapter].loss] if self.losses else []
        return not all(map(math.isfinite, figures))

    @property
    def changes_nothing(self) -> str | None:
        """Why the adapter changes nothing, where it does not."""
        same = not self.losses or self.losses[self.adapter].rows == self.losses[BASE].rows
        if not same or any(p.sides[self.adapter].shift != 0 for p in self.prompts):
            return None
        return "the norm of its delta is 0" if self.norm == 0 else "every logit is that of the base"

    def mean(self, name: str, figure: str) -> float:
        """The mean over the prompts of "shift" or "divergence"."""
        return sum(getattr(p.sides[name], figure) for p in self.prompts) / len(self.prompts)

    def changed(self, name: str) -> int:
        """How many answers differ from the base's."""
        return sum(p.sides[name].diverges is not None for p in self.prompts)

    def first_change(self, name: str) -> int | None:
        """Where the changed answers leave the base's, in the median."""
        places = sorted(d for p in self.prompts if (d := p.sides[name].diverges) is not None)
        return places[len(places) // 2] if places else None


def compare(
    model: Any,
    tokenizer: Any,
    adapter: str,
    prompts: Sequence[Any] = (),
    examples: Sequence[Example] = (),
    null: bool = True,
    max_new_tokens: int = 64,
    system: str | None = None,
    raw: bool = False,
    seed: int = 0,
    counting: Counting = silently,
) -> Comparison:
    """Compare a model with an adapter to the same model without it, and with a null adapter of the same norm.

    Args:
        prompts: texts or conversations to answer; by default those of the first rows, or three common ones.
        examples: rows to score, for losses and accuracies.
        null: False leaves the null adapter out.
    """
    asked = _prompts(tokenizer, prompts, examples, system, raw)
    names, norm, why = _with_null(model, adapter, null, seed)
    losses: dict[str, LossResult] = {}
    said: dict[str, list[list[int]]] = {}
    shifts: dict[str, list[tuple[float, float]]] = {}
    reference: list[Tensor] = []
    special, pad_id = tuple(tokenizer.all_special_ids), pad_token(tokenizer)
    try:
        for name in names:
            with using(model, name), evaluating(model):
                logits = [_logits(model, ids) for _, ids in asked]
                reference = reference or logits
                shifts[name] = [_shift(a, b) for a, b in zip(logits, reference)]
                ids = [ids for _, ids in asked]
                said[name] = generate_ids(model, ids, pad_id, max_new_tokens) if asked else []
                if examples:
                    losses[name] = evaluate_loss(model, examples, pad_id, special=special, counting=counting)
    finally:
        if NULL in names:
            model.delete_adapter(NULL)
    rows = []
    for i, (text, _) in enumerate(asked):
        sides = {n: _side(tokenizer, said[n][i], said[BASE][i], shifts[n][i]) for n in names}
        rows.append(Prompt(text, sides))
    return Comparison(adapter, names, norm, rows, losses, why)


def _with_null(model: Any, adapter: str, null: bool, seed: int) -> tuple[list[str], float | None, str | None]:
    """(whom to compare, the norm of all dW, why there is no null adapter); the null adapter is added to the model."""
    names = [BASE, adapter]
    try:
        norms = delta_norms(model, adapter)
    except PeftError as e:
        return names, None, str(e)
    norm = math.sqrt(sum(d.norm**2 for d in norms.values()))
    if not null:
        return names, norm, "not asked for"
    try:
        covered = add_null_adapter(model, adapter, NULL, seed, norms)
    except PeftError as e:
        return names, norm, str(e)
    left = [path for path in norms if path not in covered]
    return [*names, NULL], norm, f"it leaves out {len(left)} of {len(norms)} layers" if left else None


def _prompts(
    tokenizer: Any, prompts: Sequence[Any], examples: Sequence[Example], system: str | None, raw: bool
) -> list[tuple[str, list[int]]]:
    """(what to show, token ids) of each prompt to answer."""
    if not prompts and examples:
        own = [e.ids[: e.prompt_length] for e in examples if e.prompt_length][:3]
        return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids) for ids in own]
    texts = prompts or PROMPTS
    shown = [p if isinstance(p, str) else str(p[-1]["content"]) for p in texts]
    return list(zip(shown, (encode_prompt(tokenizer, p, system, raw) for p in texts)))


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:  # (T, V), of the last positions of a long prompt
    device = next(model.parameters()).device
    out: Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0]
    return out[-min(len(ids), POSITIONS) :].float().cpu()  # a prompt method may have put tokens in front


def _shift(logits: Tensor, reference: Tensor) -> tuple[float, float]:
    """(largest change of a logit, mean KL(reference || logits))."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((logits - reference).abs().max()), float((p.exp() * (p - q)).sum(-1).mean())


def _side(tokenizer: Any, ids: list[int], base: list[int], shift: tuple[float, float]) -> Side:
    shared = next((i for i, (a, b) in enumerate(zip(ids, base)) if a != b), min(len(ids), len(base)))
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Side(text, ids, None if ids == base else shared, *shift)
