"""Answers to many prompts at once, each by its own adapter, and one answer as it comes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.shell.opening import BASE, using
from trimtab.train.data import IGNORE, Example
from trimtab.train.metrics import exact_match
from trimtab.train.prompts import Message, encode_prompt

__all__ = [
    "Answer", "answer", "as_fits", "complete", "exact_match", "free_memory", "generate_ids", "pad_token", "references",
    "sampling_of", "silently", "stream",
]  # fmt: skip

Done = Callable[[int], None]  # told how many more are done
Counting = Callable[[str, int], AbstractContextManager[Done]]  # (what is done, how many there are) -> a `Done`


@contextmanager
def silently(title: str, total: int) -> Iterator[Done]:
    """Count for nobody."""
    yield lambda n: None


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    prompt: Any  # as it was given
    adapter: str  # "base" where none
    text: str
    ids: list[int]
    finish: str  # "stop": the model ended it; "length": it was cut


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompts: Sequence[list[int]],
    pad_id: int,
    max_new_tokens: int,
    adapters: Sequence[str] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Continuations of token prompts in one batch, greedy by default, cut after the first end token; dropout off.

    Args:
        adapters: one a prompt, "base" for none; None: the active one for all.
        sampling: as for `generate`: do_sample, temperature, top_p, streamer ...
    """
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    # Padded on the left: every prompt ends where its continuation begins.
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)  # (B, T)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad_id, **sampling}
    if not options["do_sample"]:  # settings of sampling that the model's own file brings, which only warn here
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if adapters is not None:
        options["adapter_names"] = ["__base__" if name == BASE else name for name in adapters]
    was_training = model.training
    model.eval()
    try:
        generate: Any = model.generate
        out = generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()
    finally:
        model.train(was_training)
    stops = stop_ids(model)
    return [row[: next((i + 1 for i, id in enumerate(row) if id in stops), len(row))] for row in out]


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    adapters: Sequence[str] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    system: str | None = None,
    raw: bool = False,
    counting: Counting = silently,
    **sampling: Any,
) -> list[Answer]:
    """What each adapter says to each prompt: prompts of like length and all adapters share a batch.

    Args:
        prompts: texts, or conversations that end with the user.
        adapters: names, "base" for the model alone. None: the active ones as they are.
        system: the system message of conversations that have none.
        raw: texts go in as they are, without the chat template.

    Returns:
        The answers, prompt by prompt, each by the adapters in their order.
    """
    encoded = [encode_prompt(tokenizer, p, system, raw) for p in prompts]
    names: list[str | None] = list(adapters) if adapters else [None]
    tasks = [(i, j) for i in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])) for j in range(len(names))]
    if not mixes(model, names):  # one adapter after the other, then
        tasks.sort(key=lambda t: t[1])
    found: dict[tuple[int, int], Answer] = {}
    stops, pad_id = stop_ids(model), pad_token(tokenizer)
    with counting("Answering", len(tasks)) as done:
        while tasks:
            part = tasks[:batch_size]
            if not mixes(model, names):
                part = [t for t in part if t[1] == part[0][1]]
            tasks = tasks[len(part) :]
            which = [names[j] for _, j in part]
            mixed = None if which[0] is None or not mixes(model, names) else [str(name) for name in which]
            with nullcontext() if mixed is not None or which[0] is None else using(model, which[0]):
                said = generate_ids(model, [encoded[i] for i, _ in part], pad_id, max_new_tokens, mixed, **sampling)
            for (i, j), ids in zip(part, said):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                finish = "stop" if ids and ids[-1] in stops else "length"
                found[i, j] = Answer(prompts[i], names[j] or active(model), text, ids, finish)
            done(len(part))
    return [found[i, j] for i in range(len(prompts)) for j in range(len(names))]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    write: Callable[[str], None],
    adapter: str | None = None,
    max_new_tokens: int = 512,
    system: str | None = None,
    raw: bool = False,
    **sampling: Any,
) -> Answer:
    """One answer, whose text is handed to `write` as it comes; what `write` raises ends it."""
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    ids = encode_prompt(tokenizer, prompt, system, raw)
    writer = Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with nullcontext() if adapter is None else using(model, adapter):
        (said,) = generate_ids(model, [ids], pad_token(tokenizer), max_new_tokens, streamer=writer, **sampling)
        name = adapter or active(model)
    finish = "stop" if said and said[-1] in stop_ids(model) else "length"
    return Answer(prompt, name, tokenizer.decode(said, skip_special_tokens=True).strip(), said, finish)


def sampling_of(temperature: float, top_p: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """What `generate` is to be told; a temperature of 0 is greedy."""
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}


def mixes(model: Any, names: Sequence[str | None]) -> bool:
    """Whether these adapters can answer in one batch: no prompts among them, and no biases of the base's own."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or names == [None]:
        return False
    # A prompt or a router that is loaded, even if it answers nothing here, may be the active one.
    whole = any(a.prompt is not None for a in model.graft.adapters.values())
    return not whole and all(getattr(c, "bias", "none") == "none" for c in configs.values())


def active(model: Any) -> str:
    """The name of what answers now."""
    names = getattr(model, "active_adapters", None) if isinstance(getattr(model, "peft_config", None), dict) else None
    return "+".join(names) if names and not callable(names) else BASE


def stop_ids(model: nn.Module) -> set[int]:
    """The tokens at which the model's generation ends."""
    config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
    eos = getattr(config, "eos_token_id", None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def pad_token(tokenizer: Any) -> int:
    """What to pad with; padding is masked, so any token does."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if found is not None else 0


def complete(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int = 100,
    done: Done = lambda n: None,
) -> list[str]:
    """The model's greedy answer to each example's prompt, as text; prompts of like length share a batch.

    Args:
        batch_size: answers at a time; halved where the memory does not suffice.
        done: told how many more are done.
    """
    answers = [""] * len(examples)

    def work(rows: list[int]) -> None:
        prompts = [examples[i].ids[: examples[i].prompt_length] for i in rows]
        for i, ids in zip(rows, generate_ids(model, prompts, pad_token(tokenizer), max_new_tokens)):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        done(len(rows))

    order = sorted(range(len(examples)), key=lambda i: -examples[i].prompt_length)
    for start in range(0, len(order), batch_size):
        as_fits(work, order[start : start + batch_size])
    return answers


def as_fits(work: Callable[[list[int]], None], rows: list[int]) -> None:
    """Do the rows; where an accelerator's memory does not suffice, half of them at a time."""
    try:
        work(rows)
        return
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    free_memory()  # outside the handler: what the failed batch held hangs on the exception
    half = len(rows) // 2
    as_fits(work, rows[:half])
    as_fits(work, rows[half:])


def free_memory() -> None:
    """Give cached memory of an accelerator back."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def references(tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """What each example's last answer should be, as text."""
    answers = ([id for id in e.labels[e.prompt_length :] if id != IGNORE] for e in examples)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
