"""What a model knows of one adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab.core.method import Method, PromptMethod
from trimtab.core.targets import Target
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedBiases, SavedModule


@dataclass
class Adapter:
    """What the model knows of one adapter."""

    name: str
    config: Any
    method: type[Method]
    targets: list[Target] = field(default_factory=list)
    layers: list[AdaptedLayer] = field(default_factory=list)
    prompt: PromptMethod | None = None
    saved: list[SavedModule] = field(default_factory=list)
    biases: SavedBiases | None = None
    trainable: bool = False
    parked: bool = False

    @property
    def parts(self) -> list[AdaptedLayer | SavedModule]:
        """All that the adapter has in the module tree of the base."""
        return [*self.layers, *self.saved]

    @property
    def methods(self) -> list[Method]:
        """The adapter's own method at each of its sites."""
        return [m for layer in self.layers for m in layer.methods[self.name] if isinstance(m, self.method)]
