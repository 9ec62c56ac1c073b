"""Checkpoints: a folder each, `checkpoint-<step>`, which holds the adapter as a user wants it and the run's own state.

It appears whole, by a rename, or not at all; older ones go when it is there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import TrainError
from trimtab.shell import saving, training
from trimtab.shell.locate import locate_graft
from trimtab.train.loop import Event, Run, TrainResult
from trimtab.train.processes import Alone

__all__ = [
    "Checkpoints", "checkpoints_in", "go_back", "load_checkpoint", "save_adapter", "write_folder", "writing",
]  # fmt: skip

STATE = "trainer_state.pt"
ONLY = "default"  # what a model's only adapter is called


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the earliest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


class Checkpoints(Event):
    """Writes a checkpoint every so many steps, where the scores are the best yet, and where the run is stopped.

    Args:
        folder: the run's.
        every: steps; 0: after each epoch; -1: only where the run is stopped.
        limit: how many are kept, beside the best.
        keep_best: keep the best, too, and write one for it.
        identity: what must be the same for a resumed run to be the same run.
    """

    def __init__(
        self,
        folder: Path,
        every: int = 0,
        limit: int = 2,
        keep_best: bool = False,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.every, self.limit, self.keep_best = folder, every, limit, keep_best
        self.identity = dict(identity or {})
        self._written = -1

    def begin(self, run: Run) -> None:
        for left in self.folder.glob(".checkpoint-*"):  # of a run that was killed in the middle of one
            if run.processes.main:
                shutil.rmtree(left, ignore_errors=True)

    def evaluated(self, run: Run) -> None:
        if self.keep_best and run.result.best and run.result.best[0] == run.step:
            self._save(run)

    def step(self, run: Run) -> None:
        due = run.step % self.every == 0 if self.every > 0 else self.every == 0 and run.batches.ends_epoch(run.step)
        if due or run.stop:
            self._save(run)

    def _save(self, run: Run) -> None:
        if self._written == run.step:
            return
        save_checkpoint(self.folder / f"checkpoint-{run.step}", run, self.identity)
        self._written = run.step
        if run.processes.main:
            best = run.result.best[0] if self.keep_best and run.result.best else None
            old = [p for p in checkpoints_in(self.folder) if p.name != f"checkpoint-{best}"]
            for path in old[: -self.limit]:
                shutil.rmtree(path)
        run.fire("saved")


def save_checkpoint(target: Path, run: Run, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint of the run as it is now; every process takes part.

    Raises:
        TrainError: it cannot be written. What was there before is as it was.
    """
    processes, model = run.processes, run.processes.unwrap(run.model)
    own = own_tensors(model, run.adapter)
    state = {
        "identity": dict(identity),
        "result": asdict(run.result),
        "tensors": {n: whole(t) for n, t in own.items()},
        "trained": [n for n, t in own.items() if t.requires_grad],
        "adapters": _reached(model, run.adapter),
        "optimizer": processes.optimizer_state(run.model, run.optimizer),
        "random": processes.gather(random_state()),
    }

    def write(folder: Path) -> None:
        save_adapter(model, folder, run.adapter, processes.main)
        if processes.main:
            torch.save(state, folder / STATE)

    with writing(f"The checkpoint {target}", target.parent):
        if processes.main:
            write_folder(target, write)
        else:
            write(target)
    processes.wait()


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder.

    Raises:
        TrainError: it failed; says which checkpoint there is to go on from.
    """
    try:
        yield
    except Exception as e:  # torch and safetensors have errors of their own for a full disk
        older = checkpoints_in(folder)
        left = f" {older[-1].name} is as it was; go on from it with --resume." if older else ""
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        raise TrainError(f"{what} could not be written: {reason}.{left}") from e


def load_checkpoint(
    path: Path, model: nn.Module, identity: Mapping[str, Any], adapter: str | None = None
) -> tuple[TrainResult, Callable[[nn.Module, Any, Alone], None]]:
    """Put the tensors of a checkpoint into the model, before it is prepared.

    Args:
        adapter: the one that the run trains, where the model has others.

    Returns:
        What had happened until then, and a function that restores optimiser and random numbers, for later.

    Raises:
        TrainError: the checkpoint is damaged, or of another run.
    """
    state = _read(path)
    now, then = dict(identity), state["identity"]
    changed = [f"{k} ({then.get(k)!r} then, {now.get(k)!r} now)" for k in {**then, **now} if then.get(k) != now.get(k)]
    if changed:
        raise TrainError(f"{path} is of another run. What has changed since: {', '.join(changed)}.")
    if own_tensors(model, adapter).keys() != state["tensors"].keys():
        raise TrainError(f"{path} is of another run: it trains other tensors than this one.")
    _put(model, state, adapter)

    def restore(prepared: nn.Module, optimizer: Any, processes: Alone) -> None:
        processes.load_optimizer_state(prepared, optimizer, state["optimizer"])
        set_random_state(state["random"][min(processes.rank, len(state["random"]) - 1)])
        own = own_tensors(model, adapter)
        for name in own.keys() - set(state.get("trained", own)):
            own[name].requires_grad_(False)  # its training had ended (AdaMSS): it counts in no norm of gradients

    return TrainResult(**_tuples(state["result"])), restore


def go_back(path: Path, model: nn.Module, adapter: str | None = None) -> None:
    """Give the model, or one of its adapters, what it had at a checkpoint."""
    _put(model, _read(path), adapter)


def save_adapter(model: Any, folder: Path, adapter: str | None, main: bool = True) -> None:
    """Save the model's adapters, or one of them as if it were the only one: at the root of the folder."""
    if adapter is None:
        model.save_pretrained(folder, is_main_process=main)
    else:
        saving.save(model, folder, True, [adapter], "auto", main, None, None, place=lambda root, _: root)


@torch.no_grad()
def _put(model: nn.Module, state: Mapping[str, Any], adapter: str | None) -> None:
    """Put a checkpoint's tensors into the model, also where it is split over processes, and its adapters' facts."""
    tensor: Any
    values = state["tensors"]
    for name, tensor in own_tensors(model, adapter).items():
        value = values[name].to(tensor.device)
        if hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
    if adapted(model):
        kept = {(adapter or name): value for name, value in state.get("adapters", {}).items()}
        training.go_on(locate_graft(model)[0], kept)


def _reached(model: nn.Module, adapter: str | None) -> dict[str, Any]:
    """How far the adapters are that act on steps; one of several counts as the only one."""
    found = training.reached(locate_graft(model)[0]) if adapted(model) else {}
    if adapter is None:
        return found
    return {ONLY: found[adapter]} if adapter in found else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file ends in any of them
        raise TrainError(f"{path / STATE} cannot be read: {' '.join(str(e).split())[:200]}") from e
    return state


def adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(getattr(model, "peft_config", None))


def own_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """What training may change: the adapters' parameters and buffers, and whatever else requires a gradient.

    Args:
        adapter: just the tensors of this one, under the names that they have where it is the only one.
    """
    adapters = set(getattr(model, "peft_config", ()))
    both = [*model.named_parameters(), *model.named_buffers()]
    if adapter is not None:
        parts = [(name.split("."), tensor) for name, tensor in both]
        return {".".join(ONLY if p == adapter else p for p in path): t for path, t in parts if adapter in path}
    return {name: tensor for name, tensor in both if tensor.requires_grad or adapters & set(name.split("."))}


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of what may be split over processes; all of them take part."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()


def random_state() -> dict[str, Any]:
    """The state of torch's random numbers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _tuples(result: dict[str, Any]) -> dict[str, Any]:
    pairs = {name: [(step, value) for step, value in result[name]] for name in ("losses", "scores")}
    return {**result, **pairs, "best": tuple(result["best"]) if result["best"] else None}


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder by `write`, under another name until it is whole; one that was there before gives way then."""
    part, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        for file in (p for p in part.rglob("*") if p.is_file()):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
