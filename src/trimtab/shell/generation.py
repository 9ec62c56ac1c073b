"""How a `PeftModel` runs: forward and generation, with a prompt, a mixed batch, or without adapters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.core.method import Call
from trimtab.core.model_method import PROMPT
from trimtab.graft import prompts
from trimtab.layer.plan import Row, listed
from trimtab.shell.facts import Facts
from trimtab.shell.running import batch_shape


class Generation(Facts):
    """What `PeftModel` does with inputs; nothing here changes which adapters there are."""

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the plain base model, even while adapters are merged into it."""
        with self.graft.off():
            yield

    @contextlib.contextmanager
    def route(self, adapter_names: Sequence[Row], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Inside the block, the rows of this thread's batches go to the adapters named, in training mode as well.

        Args:
            adapter_names: of each row: a name, "__base__", or several, innermost first, each by name or with its scale
                (`[("sql", 0.7), ("style", 0.3)]`). A call's own `adapter_names` go before these.
            lengths: the tokens of each row, where they lie one after another in one sequence (1, tokens).

        Raises:
            AdapterNameError: a name that no adapter has.
            ValueError: an adapter that a row cannot have for itself (a prompt, trained biases), or a merged one.
            RouteError: a layer that cannot tell which part of its input belongs to which row.
        """
        rows = listed(adapter_names)
        self._prompt(rows)
        with self.tuner.routed(rows, lengths, open=True):
            yield

    def forward(self, *args: Any, adapter_names: Sequence[Row] | None = None, **kwargs: Any) -> Any:
        """The model's output; in a mixed batch `adapter_names` gives each row its adapter ("__base__": none)."""
        rows, lengths = self._rows(adapter_names)
        adapter = self._prompt(rows)
        if adapter is not None:
            kwargs |= dict(zip(inspect.signature(self.get_base_model().forward).parameters, args, strict=False))
            call = Call(extras=self.tuner.extras(kwargs))
            inputs = prompts.enter(adapter.prompt, adapter.config, self.get_base_model(), kwargs, call)
            return adapter.prompt.around(self.tuner, inputs, call)
        return self._runs(*args, adapter_names=rows, lengths=lengths, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[Row] | None = None, **kwargs: Any) -> Any:
        """Generate as the base model does; `adapter_names` as in `forward`, one for each prompt."""
        rows, lengths = self._rows(adapter_names)
        adapter = self._prompt(rows)
        extras = self.tuner.extras(kwargs, rows, args)
        if adapter is not None:
            call = Call(extras=extras)
            return prompts.generate(adapter.prompt, adapter.config, self.get_base_model(), args, kwargs, call)
        with self.tuner.routed(rows, lengths, shape=batch_shape(args, kwargs), **extras):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model is given in the next pass of a generation, the active prompt included."""
        adapter, base = self._prompt(None), self.get_base_model()
        if adapter is None:
            return base.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]
        call = Call(extras=self.tuner.extras(kwargs, None, args))
        return prompts.prepared(adapter.prompt, adapter.config, base, args, kwargs, call)

    def _prompt(self, adapter_names: Sequence[Row] | None) -> Any:
        """The active adapter that is a prompt, or None."""
        route = self.graft.board.route_here(quiet=adapter_names is not None)
        found = [self.graft.adapters[n] for n in route.active if n in self.graft.prompts] if route.enabled else []
        if len(found) > 1 or (found and adapter_names is not None):
            raise ValueError("One prompt can be active at a time, and none in a mixed batch (`adapter_names`).")
        return found[0] if found else None

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The active prompt for `batch_size` rows: embeddings (rows, tokens, dim), or a cache of keys and values."""
        adapter = self._prompt(None)
        if adapter is None:
            raise ValueError("No prompt is active.")
        prompt = adapter.prompt.prompt(Call(extras={"task_ids": task_ids}))
        if adapter.prompt.cached:
            return prompts.prefilled(prompt, adapter.config, self.get_base_model(), batch_size)
        return prompt.expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The prompt of an adapter as it is saved: (tokens, dim), or (tokens, layers · 2 · dim)."""
        prompt: Any = self.graft.require(adapter_name).prompt
        saved: Tensor = prompt.saved()[PROMPT].detach().cpu()
        return saved

    def _rows(self, adapter_names: Sequence[Row] | None) -> tuple[Sequence[Row] | None, Sequence[int] | None]:
        """(the adapters, the lengths) of a call's rows: its own, or those of the block that it is in."""
        if adapter_names is None:
            plan = self.graft.board.route_here().plan
            return (None, None) if plan is None else (plan.names, plan.lengths)
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        return adapter_names, None

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients reach the adapters through checkpointed blocks whose inputs are frozen."""
        quantised = any(getattr(model, f"is_{q}", False) for q in ("loaded_in_8bit", "loaded_in_4bit", "quantized"))
        if not quantised and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        return model
