"""EVA's forward hooks as peft has them: for programs that watch the inputs of layers by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.as_peft.parts import IncrementalPCA
from trimtab.errors import PeftWarning
from trimtab.init.eva import gathered, in_processes

__all__ = ["HashHook", "SVDHook"]


class _Hook:
    """Sees the inputs of a layer it is registered at (`register_forward_hook`).

    Args:
        name: the layer's.
        prepare_layer_inputs_fn: (the layer's input, `model_input`, name) -> the rows (n, features) that count.
        gather_distributed_inputs: take the rows of all processes, where there are several.

    Attributes:
        model_input: what the function is given; the caller sets it for each batch.
    """

    def __init__(
        self,
        name: str,
        prepare_layer_inputs_fn: Callable[..., Tensor] | None = None,
        gather_distributed_inputs: bool = True,
    ) -> None:
        self.name, self.gather_distributed_inputs = name, gather_distributed_inputs
        self._prepare_layer_inputs_fn = prepare_layer_inputs_fn or self._prepare_layer_inputs_fn_default
        self.model_input: Any = None

    @staticmethod
    def _prepare_layer_inputs_fn_default(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
        x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        if not isinstance(x, Tensor):
            raise TypeError(
                f"The input of layer {layer_name} is of type {type(layer_input)}: give a `prepare_layer_inputs_fn` "
                "that takes it."
            )
        return x.flatten(0, -2)

    @torch.no_grad()
    def prepare_layer_inputs(self, layer_input: Any) -> Tensor:
        """The rows (n, features) of an input that count."""
        return self._prepare_layer_inputs_fn(layer_input, self.model_input, self.name)

    @torch.no_grad()
    def gather_layer_inputs(self, layer_input: Tensor) -> Tensor:
        """The rows of all processes."""
        return gathered(layer_input) if self.gather_distributed_inputs and in_processes() else layer_input


class SVDHook(_Hook):
    """Finds the leading right singular vectors of the inputs, batch by batch.

    Args:
        n_components: how many.
        sim_thresh: the cosine with its former self at which a vector has converged; one for all, or of each.

    Attributes:
        svd: has them as `components_`.
        converged: which have (n,).
    """

    def __init__(self, n_components: int, sim_thresh: float | Tensor, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.n_components, self.sim_thresh = n_components, sim_thresh
        self.svd = IncrementalPCA(n_components)
        self.converged = torch.zeros(n_components, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        """Take a batch; one of fewer rows than there are vectors is left out."""
        rows = self.gather_layer_inputs(self.prepare_layer_inputs(input))
        if len(rows) < self.n_components:
            warnings.warn(
                f"{len(rows)} rows are too few for {self.n_components} vectors of {self.name}: they are left out.",
                PeftWarning,
                stacklevel=2,
            )
            return
        before = self.svd.components_ if self.svd.pca is not None else None
        self.svd.partial_fit(rows.float())
        now = self.svd.components_
        if before is not None and now is not None:
            self.converged = torch.cosine_similarity(before, now) >= self.sim_thresh


class HashHook(_Hook):
    """Notes what each input hashes to: layers that see the same share it."""

    def __init__(self, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.hashed_inputs: list[int] = []

    @staticmethod
    def hash_fn(tensor: Tensor) -> int:
        """A number that follows from a tensor's entries."""
        return hash(tuple(tensor.flatten().tolist()))

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        """Note an input."""
        self.hashed_inputs.append(self.hash_fn(self.gather_layer_inputs(self.prepare_layer_inputs(input))))
