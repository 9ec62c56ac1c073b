"""The processes that train together: one, or several through accelerate (DDP, FSDP 2)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.extras import need
from trimtab.errors import TrainError
from trimtab.train.batches import Batch

__all__ = ["Alone", "Several", "processes", "require_one"]


class Alone:
    """One process: nothing to share, nothing to wait for."""

    count, rank = 1, 0

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Model and optimiser as they are to be used."""
        return model, optimizer

    def unwrap(self, model: nn.Module) -> Any:
        """The model as it was before `prepare`."""
        return model

    def share(self, batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
        """This process's part of a step, each batch with what it counts.

        All have as many, since they wait for each other in each: where there are too few, a batch counts 0.
        """
        mine = [(b, 1.0) for b in batches[self.rank :: self.count]]
        missing = -(-len(batches) // self.count) - len(mine)
        return mine + [(batches[0], 0.0)] * missing

    def backward(self, loss: Tensor, model: nn.Module, last: bool) -> None:
        """The gradients of a loss; those of all processes meet in the last batch of a step."""
        loss.backward()

    def forward_context(self, model: nn.Module, last: bool) -> Any:
        """Around the forward and backward pass of a batch."""
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clip the gradients to the norm `limit` (0: not at all); returns the norm they had."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def sum(self, value: Tensor) -> float:
        """The sum of a number over the processes."""
        return float(value)

    def gather(self, value: Any) -> list[Any]:
        """The value that each process has."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def wait(self) -> None:
        """Until all processes are here."""

    def optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """The optimiser's state, whole; every process takes part."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Put back what `optimizer_state` gave."""
        optimizer.load_state_dict(state)


class Several(Alone):
    """Several processes; each has its part of every step, and together they do what one would on the whole step."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index

    @property
    def sharded(self) -> bool:
        """Whether parameters are split over the processes."""
        return str(self.accelerator.distributed_type).endswith("FSDP")

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        if self.sharded and not isinstance(optimizer, torch.optim.AdamW):
            raise TrainError("Under FSDP only the optimizer adamw can be used: the others need whole matrices.")
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def unwrap(self, model: nn.Module) -> Any:
        return self.accelerator.unwrap_model(model)

    def forward_context(self, model: nn.Module, last: bool) -> Any:
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor, model: nn.Module, last: bool) -> None:
        self.accelerator.backward(loss * self.count)  # gradients are averaged over the processes

    def sum(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value, "sum"))

    def gather(self, value: Any) -> list[Any]:
        need("Training with several processes", "accelerate")
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def any(self, flag: bool) -> bool:
        return self.sum(torch.tensor(float(flag), device=self.accelerator.device)) > 0

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        if not self.sharded:
            return super().optimizer_state(model, optimizer)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(model, optimizer.optimizer, options=options)

    def load_optimizer_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        if not self.sharded:
            super().load_optimizer_state(model, optimizer, state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer.optimizer, optim_state_dict=state, options=options)


def processes() -> Alone:
    """What the launcher (`accelerate launch`, torchrun) has started: this process alone, or several.

    Raises:
        MissingPackageError: several processes, and accelerate is not installed.
    """
    if _count() < 2:
        return Alone()
    need("Training with several processes", "accelerate")
    from accelerate import Accelerator

    return Several(Accelerator(cpu=not torch.cuda.is_available()))


def require_one(what: str) -> None:
    """Raise `TrainError` where the launcher has started several processes: each would train all of it by itself."""
    if (count := _count()) > 1:
        raise TrainError(
            f"{what} runs in one process, and {count} were started: start it without `accelerate launch` or torchrun."
        )


def _count() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
