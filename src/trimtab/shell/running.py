"""How an adapted model runs: what formulas must know of a forward, rows that go to adapters of their own, penalties."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab.core.method import Call, overrides
from trimtab.graft.graft import Graft
from trimtab.layer.plan import Board, Plan, Row, require_known, wanted
from trimtab.shell import mixtures


class Running(nn.Module):
    """The forward of the tuner; nothing here changes which adapters there are.

    Attributes:
        model: the model, adapted in place.
        graft: its adapters.
        added: those whose penalties the last forward has added to its loss.
    """

    model: nn.Module
    graft: Graft
    added: tuple[str, ...] = ()

    def extras(
        self, inputs: dict[str, Any], adapter_names: Sequence[Row] | None = None, args: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """What the formulas of adapters (of the active ones by default) must know of a forward.

        Args:
            inputs: its arguments by name; those that are for formulas are taken out.
            args: its other arguments.
        """
        active = self.graft.board.route_here(quiet=True).active
        names = active if adapter_names is None else [name for row in adapter_names for name, _ in wanted(row)]
        adapters = [self.graft.adapters[n] for n in dict.fromkeys(names) if n in self.graft.adapters]
        found = {name: inputs.pop(name, None) for a in adapters for name in a.method.extras if name in inputs}
        curious = [a for a in adapters if overrides(a.method, "facts")]
        watching = [a for a in adapters if a.method.watches and a not in curious]
        if curious:
            whole = {**dict(zip(inspect.signature(self.model.forward).parameters, args, strict=False)), **inputs}
            for adapter in curious:
                facts = adapter.method.facts(adapter.config, whole, self.training)
                found |= {f"{adapter.name}.{key}": value for key, value in facts.items()}
                watching += [adapter] if adapter.method.watches and facts else []
        found |= {f"{a.name}.seen": {"model": self.model} for a in watching}
        return {name: value for name, value in found.items() if value is not None}

    @contextlib.contextmanager
    def routed(
        self,
        adapter_names: Sequence[Row] | None = None,
        lengths: Sequence[int] | None = None,
        open: bool = False,
        shape: Sequence[int] = (),
        calls: Mapping[str, Call] | None = None,
        **extras: Any,
    ) -> Iterator[None]:
        """Inside the block, rows of a batch go to the adapters named, one a row ("__base__": none).

        Args:
            adapter_names: a row may also name several, innermost first, each with its scale or by name alone:
                `[("sql", 0.7), "style"]`.
            lengths: the tokens of each row, where they lie one after another in one sequence.
            open: the block is the caller's own.
            shape: (rows, tokens) of the batch, as far as they are known.
            calls: {adapter: what the formulas of its rows are handed}, for rows with random numbers of their own.
            extras: what formulas read of the forward, by name.
        """
        if adapter_names is None:
            watched, mixed = mixtures.watching(self.model, [extras]), mixtures.surrounding(self.graft)
            with watched, mixed, self.graft.board.handing(extras):
                yield
            return
        graft = self.graft
        plan = Plan(adapter_names, lengths, extras=extras, calls=calls)
        require_known(plan.adapters, graft.adapters)
        if whole := [n for n in plan.adapters if n in graft.adapters and graft.adapters[n].prompt is not None]:
            raise ValueError(f"{whole} act on the model as a whole: no row of `adapter_names` can have one for itself.")
        for path, layer in graft.base.foreign.items():
            if not {*plan.adapters}.isdisjoint(layer.adapters):
                raise ValueError(
                    f"`adapter_names` cannot be used at '{path}': {type(layer).__name__}, a layer class of its own, "
                    "knows no rows."
                )
        if graft.biased():
            raise ValueError("`adapter_names` cannot be used with an adapter that trains the base's biases.")
        if graft.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        plan.tell(shape)
        hook = self.model.register_forward_pre_hook(partial(_tell, graft.board, plan), with_kwargs=True)
        try:
            watched = mixtures.watching(self.model, [call.extras for call in plan.calls], plan)
            with watched, graft.board.using(open=open, plan=plan):
                with graft.board.moving:  # from now on no other thread parks them
                    graft.residents.bring(plan.adapters)
                yield
        finally:
            hook.remove()
            graft.board.forget()
            graft.settle(plan.adapters)

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[Row] | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's output; `adapter_names` gives each row of the batch its adapter (see `routed`)."""
        extras = self.extras(kwargs, adapter_names, args)
        if adapter_names is None:
            with self.routed(**extras):
                try:
                    return self._penalised(self.model(*args, **kwargs), self.graft.board.route.active)
                finally:
                    self.graft.board.forget()
        shape = batch_shape(args, kwargs)
        if shape and lengths is None and shape[0] != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {shape[0]} respectively."
            )
        with self.routed(adapter_names, lengths, shape=shape, **extras):
            named = dict.fromkeys(name for row in adapter_names for name, _ in wanted(row))
            return self._penalised(self.model(*args, **kwargs), list(named))

    def _penalised(self, outputs: Any, names: Sequence[str]) -> Any:
        """Outputs whose loss, in training, has the penalties of adapters added."""
        loss: Any = getattr(outputs, "loss", None)
        left = loss is None or not self.training or not self.graft.board.route_here(quiet=True).enabled
        terms = {} if left else self.penalties(names)
        if terms or self.added:
            self.added = tuple(terms)
        for name, term in terms.items():
            loss = loss + term.to(loss.device)
            adapter = self.graft.adapters[name]
            for called, value in adapter.method.reported(term, adapter.config).items():
                setattr(outputs, called, value)
                self.__dict__[f"last_{called}"] = value.detach()  # wrappers of several processes rebuild the outputs
        if terms:
            outputs.loss = loss
        return outputs

    def penalties(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """{adapter: what it adds to its loss in training}, of those that add something (the active ones by default)."""
        found = {}
        for name in self.graft.board.route.active if names is None else names:
            adapter = self.graft.adapters[name]
            term = adapter.method.penalty(adapter.formulas, adapter.config)
            if term is not None:
                found[name] = term
        return found

    def penalty_left(self, formula: str, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What adapters of a formula (the active ones by default) add to the loss and the last forward has not added.

        That is nothing where `outputs.loss` has it already, and outside training. It is for loops with losses of their
        own, as PEFT's users write them (`_get_..._loss`).
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = self.graft.board.route.active if names is None else names
        known = self.graft.adapters
        wanted = [
            n for n in names if n in known and known[n].method.__name__.lower() == formula and n not in self.added
        ]
        return sum(self.penalties(wanted).values(), 0.0) if self.training else 0.0


INPUTS = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "pixel_values", "input_features")


def batch_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The leading axes (rows, tokens ...) of a call's inputs, or () where no tensor tells."""
    candidates = [*args[:1], *(kwargs[n] for n in INPUTS if kwargs.get(n) is not None), *kwargs.values()]
    return next((tuple(v.shape[:2]) for v in candidates if isinstance(v, Tensor) and v.ndim), ())


def _tell(board: Board, plan: Plan, model: nn.Module, args: Any, kwargs: Any) -> None:
    """Note what shapes the model is really called with, by this thread: generation repeats rows for beams."""
    if board.route_here(quiet=True).plan is not plan:
        return
    tensors = [*args[:1], *(kwargs.get(n) for n in (*INPUTS, "decoder_inputs_embeds", "attention_mask"))]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            plan.tell(tensor.shape)
