"""A plain training loop: AdamW, warm-up and decay, clipping, held-out loss, a checkpoint one can resume from exactly.

It trains whatever parameters of the model require a gradient, and knows nothing of adapters.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.io import write_whole
from trimtab.errors import TrainError
from trimtab.train.data import IGNORE, Example, batch_plan, collate
from trimtab.train.progress import Progress

__all__ = ["TrainError", "TrainResult", "TrainingArguments", "evaluate", "train"]


@dataclass(frozen=True)
class TrainingArguments:
    """How to train. The names are those of transformers' TrainingArguments."""

    learning_rate: float = 2e-4
    num_train_epochs: float = 3.0
    max_steps: int = -1  # optimiser steps in all; overrides the epochs when positive
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0  # of the order of the rows, and of dropout
    eval_steps: int = 0  # held-out loss every so many steps; 0: after each epoch
    save_steps: int = 0  # a checkpoint every so many steps; 0: only on Ctrl-C
    output_dir: str | None = None  # where metrics.jsonl and checkpoint.pt go


@dataclass
class TrainResult:
    """What happened. Losses are means over trained tokens, in nats."""

    step: int = 0
    tokens: int = 0  # not counting padding
    seconds: float = 0.0  # of training, without evaluations
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, training loss)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: nn.Module,
    examples: Sequence[Example],
    args: TrainingArguments,
    valid: Sequence[Example] = (),
    pad_id: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the model's trainable parameters on `examples`.

    Ctrl-C ends it after the step at hand, with a checkpoint if there is an `output_dir`; a second one ends it at once.

    Args:
        valid: held-out examples for `result.eval_losses`.
        pad_id: what to pad with; padding is masked, so any id does.
        resume: go on from `output_dir/checkpoint.pt` as if there had been no break, if it is there.

    Raises:
        TrainError: nothing is trainable, the loss is not finite, or the checkpoint belongs to another run.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainError("No parameter of the model requires a gradient: there is nothing to train.")
    plan = _plan(examples, args)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    run = _Run(args, parameters, optimizer, _digest(examples))
    result = run.load() if resume else TrainResult()
    if not result.step:
        torch.manual_seed(args.seed)
    steps_an_epoch = len(_epoch(examples, args, 0))
    evaluate_every = args.eval_steps or steps_an_epoch
    progress = progress or Progress()
    progress.start(_tokens(examples, plan), done=_tokens(examples, plan[: result.step]))
    was_training = model.training
    model.train()
    try:
        with _interruptible() as interrupt:
            for step in range(result.step, len(plan)):
                began = time.perf_counter()
                rate = args.learning_rate * _factor(step, len(plan), args)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss, norm = _step(model, [[examples[i] for i in b] for b in plan[step]], args, optimizer, pad_id)
                if not math.isfinite(loss):
                    rows = sorted(i + 1 for batch in plan[step] for i in batch)
                    raise TrainError(
                        f"The loss is {loss} at step {step + 1}, on rows {rows}. Try a smaller learning rate."
                    )
                tokens, seconds = _tokens(examples, plan[step : step + 1]), time.perf_counter() - began
                result.step, result.tokens, result.seconds = step + 1, result.tokens + tokens, result.seconds + seconds
                result.losses.append((result.step, loss))
                epoch = round(result.step / steps_an_epoch, 4)
                run.write(step=result.step, epoch=epoch, loss=loss, learning_rate=rate, grad_norm=norm, tokens=tokens,
                          tokens_per_second=round(tokens / seconds, 1))  # fmt: skip
                progress.step(tokens, f"step {result.step}/{len(plan)}", _recent(result.losses), seconds)
                stop = interrupt.is_set()
                if valid and not stop and (result.step % evaluate_every == 0 or result.step == len(plan)):
                    held_out = evaluate(model, valid, 2 * args.per_device_train_batch_size, pad_id)
                    result.eval_losses.append((result.step, held_out))
                    run.write(step=result.step, epoch=epoch, eval_loss=held_out)
                    progress.note(f"step {result.step}: held-out loss {held_out:.4f}")
                if stop or (args.save_steps and result.step % args.save_steps == 0):
                    run.save(result)
                if stop:
                    result.interrupted = True
                    progress.note(
                        f"Stopped at step {result.step} of {len(plan)}" + (", saved." if args.output_dir else ".")
                    )
                    break
    finally:
        progress.close()
        model.train(was_training)
    return result


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Example], batch_size: int = 16, pad_id: int = 0) -> float:
    """Mean loss over the trained tokens of `examples`, in nats; dropout off."""
    was_training = model.training
    model.eval()
    try:
        total = 0.0
        for batch in batch_plan(examples, batch_size):
            part = [examples[i] for i in batch]
            total += float(loss_of(model, part, pad_id)) * sum(e.trained for e in part)
    finally:
        model.train(was_training)
    return total / sum(e.trained for e in examples)


def loss_of(model: nn.Module, examples: Sequence[Example], pad_id: int = 0) -> Tensor:  # ()
    """The model's own loss on one batch."""
    batch = {k: v.to(_device(model)) for k, v in collate(examples, pad_id).items()}
    labels: Tensor = batch["labels"]  # (B, T)
    if _takes_positions(model):
        # The head is a good part of a small model's work: skip it before the first position that predicts anything.
        # The loss shifts the labels by one within the slice, as it would within the whole.
        first = int((labels[:, 1:] != IGNORE).any(dim=0).int().argmax())
        positions = torch.arange(first, labels.shape[1], device=labels.device)
        return model(**{**batch, "labels": labels[:, first:]}, logits_to_keep=positions, use_cache=False).loss
    return model(**batch).loss


def _takes_positions(model: nn.Module) -> bool:
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):  # the prompt shifts every position
        return False
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return {"logits_to_keep", "use_cache"} <= set(inspect.signature(base.forward).parameters)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _step(
    model: nn.Module,
    batches: list[list[Example]],
    args: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    pad_id: int,
) -> tuple[float, float]:
    """One optimiser step over some batches; returns (loss, norm of the gradient before clipping)."""
    trained = sum(e.trained for batch in batches for e in batch)
    loss = 0.0
    for batch in batches:  # weighted so that every trained token of the step counts the same
        part = loss_of(model, batch, pad_id) * (sum(e.trained for e in batch) / trained)
        part.backward()
        loss += float(part.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    if math.isfinite(loss):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, float(norm)


# --- the plan: a pure function of the rows and the arguments, so that a resumed run goes on where it was ------------


def _epoch(examples: Sequence[Example], args: TrainingArguments, epoch: int) -> list[list[list[int]]]:
    """Steps of one epoch; a step is some batches, a batch some rows. The last step may be short: no row is left out."""
    batches = batch_plan(examples, args.per_device_train_batch_size, seed=args.seed * 1_000_003 + epoch)
    n = args.gradient_accumulation_steps
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def _plan(examples: Sequence[Example], args: TrainingArguments) -> list[list[list[int]]]:
    if not examples:
        raise TrainError("There are no rows to train on.")
    an_epoch = len(_epoch(examples, args, 0))
    total = args.max_steps if args.max_steps > 0 else max(1, round(args.num_train_epochs * an_epoch))
    return [step for epoch in range(-(-total // an_epoch)) for step in _epoch(examples, args, epoch)][:total]


def _tokens(examples: Sequence[Example], plan: Sequence[list[list[int]]]) -> int:
    return sum(len(examples[i].ids) for step in plan for batch in step for i in batch)


def _factor(step: int, total: int, args: TrainingArguments) -> float:
    """The learning rate's factor for 0-based `step`: up over the warm-up, then down to nearly 0."""
    warmup = round(args.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)  # 1 ... just above 0
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[args.lr_scheduler_type]


def _recent(losses: list[tuple[int, float]], n: int = 10) -> float:
    return sum(loss for _, loss in losses[-n:]) / len(losses[-n:])


def _digest(examples: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps([(e.ids, e.labels) for e in examples]).encode()).hexdigest()


# --- what a run leaves on disk --------------------------------------------------------------------------------------


@dataclass
class _Run:
    """metrics.jsonl and checkpoint.pt of one run; does nothing without an output_dir."""

    args: TrainingArguments
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    data: str  # digest of the training rows

    def __post_init__(self) -> None:
        self.folder = Path(self.args.output_dir) if self.args.output_dir else None
        self.fresh = True  # no metric of this run is written yet

    def write(self, **metrics: float) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("w" if self.fresh else "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.fresh = False

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        own = {k: v for k, v in asdict(self.args).items() if k not in ("eval_steps", "save_steps", "output_dir")}
        return {**own, "training rows": self.data, "parameters": list(self.parameters)}

    def save(self, result: TrainResult) -> None:
        if self.folder is None:
            return
        state = {
            "identity": self._identity(),
            "result": asdict(result),
            "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        write_whole({self.folder / "checkpoint.pt": lambda path: torch.save(state, path)})

    def load(self) -> TrainResult:
        if self.folder is None:
            raise TrainError("resume needs an output_dir, where the checkpoint lies.")
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return TrainResult()
        state = torch.load(file, map_location="cpu", weights_only=True)
        now = self._identity()
        changed = [key for key, value in state["identity"].items() if now.get(key) != value]
        if changed:
            raise TrainError(f"{file} is of another run: {', '.join(changed)} changed since. Use another output_dir.")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        result = TrainResult(**{**state["result"], "interrupted": False})
        self._cut_metrics(result.step)
        return result

    def _cut_metrics(self, step: int) -> None:
        """Drop the lines after the checkpoint: those steps will be done again."""
        assert self.folder is not None
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole({file: lambda path: path.write_text("".join(kept), encoding="utf-8")})  # type: ignore[dict-item]
        self.fresh = False


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C; the second one raises KeyboardInterrupt as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def first(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
