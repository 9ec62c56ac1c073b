"""How well a model does on rows: its loss by one forward a row, its answers by generation, and what both come to.

Both also serve in the middle of training: without gradients, in batches by length that shrink where the memory is
short, and with what they took given back.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.method import overrides
from trimtab.errors import DataError
from trimtab.graft.graft import Graft
from trimtab.train.data import IGNORE, Example, collate, encode_rows, read_rows
from trimtab.train.generate import Counting, as_fits, complete, free_memory, pad_token, references, silently
from trimtab.train.loss import takes_positions
from trimtab.train.metrics import METRICS, Metric, fitting, metric
from trimtab.train.prompts import require_file

BATCH_TOKENS = 1024  # of a batch that is scored; padding included
LONG = 256  # answers of more tokens are not generated unless asked for


@dataclass(frozen=True)
class LossResult:
    """What one forward a row tells. Losses are means over the trained tokens, in nats."""

    loss: float
    tokens: int  # trained ones
    rows: list[float]  # the loss of each row
    next_token: float  # share of the trained tokens that the model would have said itself
    accuracy: float | None = None  # share of rows whose one-token label the model would say, of its whole vocabulary
    among_labels: float | None = None  # the same with no choice but the labels that occur
    commonest: float | None = None  # what always saying the commonest label would get
    labels: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Answers:
    """What generation tells."""

    answers: list[str]
    expected: list[str]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What `trimtab eval` shows."""

    loss: LossResult
    answers: Answers | None
    why: str  # these figures and no others


def evaluate_loss(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    special: Sequence[int] = (),
    counting: Counting = silently,
) -> LossResult:
    """Loss, and accuracy where the answer of every row is one token: one forward a row, dropout off, no gradients.

    Args:
        batch_tokens: tokens of a batch, padding included; rows of like length share one.
        special: tokens that do not count as a part of a label: the end of a turn.

    Raises:
        DataError: there are no rows.
    """
    if not examples:
        raise DataError("There are no rows to evaluate on.")
    labels = [_label(e, special) for e in examples]
    choices = sorted({x for x in labels if x is not None}) if all(x is not None for x in labels) else []
    nll, hits = [0.0] * len(examples), [0] * len(examples)
    said, chosen = [0] * len(examples), [0] * len(examples)

    def score(rows: list[int]) -> None:
        for i, row in zip(rows, _score(model, [examples[i] for i in rows], pad_id, choices)):
            nll[i], hits[i], said[i], chosen[i] = row
        done(len(rows))

    with evaluating(model), counting("Scoring rows", len(examples)) as done:
        for rows in by_length([len(e.ids) for e in examples], batch_tokens):
            as_fits(score, rows)
    trained = [e.trained for e in examples]
    total = sum(trained)
    result: dict[str, Any] = {}
    if choices:
        n = len(examples)
        result = {
            "accuracy": sum(a == b for a, b in zip(said, labels)) / n,
            "among_labels": sum(a == b for a, b in zip(chosen, labels)) / n,
            "commonest": Counter(labels).most_common(1)[0][1] / n,
            "labels": len(choices),
        }
    loss = sum(nll) / total if total else math.nan
    return LossResult(
        loss, total, [a / b if b else 0.0 for a, b in zip(nll, trained)], sum(hits) / max(total, 1), **result
    )


def evaluate_generate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    metrics: Sequence[str | Metric] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    counting: Counting = silently,
) -> Answers:
    """Greedy answers to the rows' prompts, and metrics of them.

    Args:
        metrics: names of `trimtab.train.metrics.METRICS`, or functions of (answers, expected). None: those that fit.
        max_new_tokens: None: a few more than the longest answer that is expected.
        batch_size: answers at a time; halved where the memory does not suffice.

    Raises:
        DataError: there are no rows, or one has no prompt to answer.
    """
    if not examples:
        raise DataError("There are no rows to evaluate on.")
    bare = [i + 1 for i, e in enumerate(examples) if not e.prompt_length]
    if bare:
        raise DataError(f"Rows {bare[:10]} have no prompt to answer: of plain text there is only a loss.")
    expected = references(tokenizer, examples)
    chosen = {m if isinstance(m, str) else m.__name__: metric(m) if isinstance(m, str) else m
              for m in (fitting(expected) if metrics is None else metrics)}  # fmt: skip
    longest = max_new_tokens or 8 + max(len(e.ids) - e.prompt_length for e in examples)
    with evaluating(model), counting("Answering", len(examples)) as done:
        answers = complete(model, tokenizer, examples, longest, batch_size, done)
    return Answers(answers, expected, {name: f(answers, expected) for name, f in chosen.items()})


def evaluate_rows(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    metrics: Sequence[str] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    counting: Counting = silently,
) -> Evaluation:
    """The loss, and what else these rows allow: one forward a row for labels of one token, else generation.

    Args:
        metrics: "loss", "accuracy", or names of `METRICS`. None given: those that fit the rows; answers of more than
            `LONG` tokens are not generated unless asked for.

    Raises:
        DataError: there are no rows, or a metric does not fit them.
    """
    unknown = [m for m in metrics if m not in ("loss", "accuracy", *METRICS)]
    if unknown:
        metric(unknown[0])
    special = tuple(tokenizer.all_special_ids)
    loss = evaluate_loss(model, examples, pad_token(tokenizer), special=special, counting=counting)
    if "accuracy" in metrics and loss.accuracy is None:
        raise DataError("Accuracy is for rows whose answer is one token: here some are longer. Use exact_match.")
    generated = [m for m in metrics if m in METRICS]
    longest = max(len(e.ids) - e.prompt_length for e in examples)
    if metrics and not generated:
        return Evaluation(loss, None, "as asked for")
    if not metrics and loss.accuracy is not None:
        return Evaluation(loss, None, "every answer is one token, so one forward a row tells")
    if not metrics and not all(e.prompt_length for e in examples):
        return Evaluation(loss, None, "plain text has no answers")
    if not metrics and longest > LONG:
        return Evaluation(
            loss, None, f"answers of up to {longest} tokens are not generated unless a metric asks for it"
        )
    answers = evaluate_generate(model, tokenizer, examples, generated or None, max_new_tokens, batch_size, counting)
    return Evaluation(loss, answers, "as asked for" if generated else "answers are generated greedily")


def examples_of(
    data: str | os.PathLike[str],
    tokenizer: Any,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    **encoding: Any,
) -> list[Example]:
    """The (first) rows of a file, encoded.

    Args:
        fields: our key -> the file's column.
        encoding: for `encode_rows`: max_length, too_long, system.

    Raises:
        DataError: no such file, no rows, or rows that cannot be read.
    """
    require_file(data)
    rows = read_rows(data, fields)
    if not rows:
        raise DataError(f"{data} has no rows.")
    return encode_rows(rows[:limit], tokenizer, **encoding)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards the mode as it was, and cached memory free for training."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        free_memory()


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of at most so many tokens with padding (or one row), the longest rows first."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def _score(
    model: nn.Module, examples: list[Example], pad_id: int, choices: list[int]
) -> list[tuple[float, int, int, int]]:
    """(summed loss, trained tokens that are the model's own choice, its first token, its first of `choices`) a row."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in collate(examples, pad_id).items()}
    labels: Tensor = batch["labels"][:, 1:]  # (B, T-1): what each position but the last should say next
    if not (told := _look(model)):
        del batch["labels"]
    first = max(0, min((_start(e) for e in examples), default=1) - 1)
    extra: dict[str, Any] = {}
    if takes_positions(model) and not told:  # the head is a good part of a small model's work
        extra = {"logits_to_keep": torch.arange(first, labels.shape[1], device=device), "use_cache": False}
    logits: Tensor = model(**batch, **extra).logits
    if not extra:  # a prompt method may have put tokens in front
        logits = logits[:, -labels.shape[1] - 1 : -1][:, first:]
    labels = labels[:, first:]
    rows = []
    for e, scores, wanted in zip(examples, logits, labels):  # one row at a time: fp32 logits of a batch are large
        trained = wanted != IGNORE
        scores, wanted = scores[trained].float(), wanted[trained]
        if not len(wanted):
            rows.append((0.0, 0, -1, -1))
            continue
        own, begin = scores.argmax(-1), _before_answer(e)
        best = choices[int(scores[begin][choices].argmax())] if choices else -1
        nll = float(F.cross_entropy(scores, wanted, reduction="sum"))
        rows.append((nll, int((own == wanted).sum()), int(own[begin]), best))
    return rows


def _look(model: nn.Module) -> bool:
    """Whether active adapters look at what the model is called with: labels tell them where the prompt ends."""
    graft: Any = getattr(model, "graft", None)
    active = graft.board.route_here(quiet=True).active if isinstance(graft, Graft) else ()
    return any(a.prompt is None and overrides(a.method, "facts") for n in active if (a := graft.adapters.get(n)))


def _start(e: Example) -> int:
    """The first trained position, at least 1: the first token of a sequence has nothing to be predicted from."""
    return next((i for i, label in enumerate(e.labels) if i and label != IGNORE), len(e.ids))


def _before_answer(e: Example) -> int:
    """How many trained tokens stand before the last answer."""
    return sum(label != IGNORE for label in e.labels[1 : max(e.prompt_length, 1)])


def _label(e: Example, special: Sequence[int]) -> int | None:
    """The one token that the last answer consists of, its end apart; None where it is longer, or there is no prompt."""
    answer = [label for label in e.labels[e.prompt_length :] if label != IGNORE] if e.prompt_length else []
    while answer and answer[-1] in special:
        answer.pop()
    return answer[0] if len(answer) == 1 else None
