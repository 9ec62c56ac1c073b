"""Facts of the base model, read off the live module tree: who stands where, under which adapters, tied to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedModule
from trimtab.layer.foreign import Foreign

WRAPPERS = (AdaptedLayer, SavedModule, Foreign)


class Base:
    """What is in a model now. It is read anew before adapters come, merge, are saved or leave: others change models.

    Attributes:
        modules: path -> the model's own module, below whatever adapters stand around it.
        holders: path -> every (parent, attribute) that holds the module or what stands around it.
        layers: path, or path of a parameter -> the adapted layer around it.
        saved: path -> the module that adapters train whole.
        foreign: path -> the layer that a user's class has made around it.
        ties: the paths of modules that hold one parameter between them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read()

    def read(self) -> None:
        """Read the model anew."""
        model = self.model
        self.modules: dict[str, nn.Module] = {}
        self.holders: dict[str, list[tuple[nn.Module, str]]] = {}
        self.layers: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, SavedModule] = {}
        self.foreign: dict[str, Any] = {}
        self._paths: dict[int, str] = {id(model): ""}
        self._owners: dict[int, list[str]] = {}
        self._own(model, "")
        self._read(model, "")
        self.ties = [names for names in self._owners.values() if len(names) > 1]

    def _read(self, parent: nn.Module, path: str) -> None:
        for attribute, child in parent._modules.items():
            if child is None:
                continue
            own = f"{path}.{attribute}" if path else attribute
            found: list[Any] = []
            while isinstance(child, WRAPPERS):
                found.append(child)
                child = _inside(child)
            assert child is not None
            if (known := self._paths.setdefault(id(child), own)) is not own:
                self.holders.setdefault(known, []).append((parent, attribute))
                continue
            self.modules[own] = child
            self.holders[own] = [(parent, attribute)]
            for wrapper in found:
                if isinstance(wrapper, SavedModule):
                    self.saved[own] = wrapper
                elif isinstance(wrapper, Foreign):
                    self.foreign[own] = wrapper
                else:
                    wrapper.path = own
                    self.layers[f"{own}.{wrapper.param}" if wrapper.param else own] = wrapper
            if child._parameters:
                self._own(child, own)
            if child._modules:
                self._read(child, own)

    def _own(self, module: nn.Module, path: str) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                self._owners.setdefault(id(parameter), []).append(path)

    # ------------------------------------------------------------------ questions
    @property
    def adapted(self) -> list[Any]:
        """The layers that adapters change: ours, and those that users' classes have made."""
        return [*self.layers.values(), *self.foreign.values()]

    @property
    def parts(self) -> list[Any]:
        """All that adapters have put around modules of the model."""
        return [*self.adapted, *self.saved.values()]

    def path_of(self, module: nn.Module | None) -> str | None:
        """The path of a module of the model, or of what stands around it."""
        while isinstance(module, WRAPPERS):
            module = _inside(module)
        return self._paths.get(id(module))

    def tied(self, path: str) -> list[str]:
        """The other modules that hold the same weight."""
        return [n for names in self.ties if path in names for n in names if n != path]

    def embeddings(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, what stands there) of the model's input and output embeddings, where it has them."""
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            module = _asked(self.model, getter)
            path = self.path_of(module)
            if module is not None and path:
                yield path, module

    @property
    def input_embedding(self) -> str | None:
        """Where the model looks up its tokens."""
        return self.path_of(_asked(self.model, "get_input_embeddings"))

    @property
    def head(self) -> str | None:
        """Where the model turns hidden states into logits."""
        return self.path_of(_asked(self.model, "get_output_embeddings"))

    @property
    def model_type(self) -> str | None:
        """What transformers calls the architecture."""
        return getattr(getattr(self.model, "config", None), "model_type", None)

    def layers_at(self, path: str) -> list[AdaptedLayer]:
        """The adapted layers around one module, innermost first."""
        found = [layer for layer in self.layers.values() if layer.path == path]
        return sorted(found, key=lambda layer: len(layer.prefix))

    # ------------------------------------------------------------------ changes
    def swap(self, path: str, new: nn.Module) -> None:
        """Put a module where the one of that path stands, at every place that holds it."""
        for parent, attribute in self.holders[path]:
            parent._modules[attribute] = new

    def note(self, layers: dict[str, AdaptedLayer], saved: dict[str, SavedModule], foreign: dict[str, Any]) -> None:
        """Note what was swapped in."""
        self.layers |= layers
        self.saved |= saved
        self.foreign |= foreign

    def without_foreign(self, merge: bool) -> None:
        """Put the model's own modules back where a user's class has made layers; with `merge`, merged as they are."""
        for path, layer in self.foreign.items():
            if not merge:
                layer.unmerge()
            self.swap(path, layer.base_layer)

    def bare(self, used: set[int]) -> None:
        """Put the model's own modules back where what stands around them is not among `used` (identities)."""
        for path in [p for p, w in self.saved.items() if id(w) not in used]:
            self.swap(path, self.saved.pop(path).original_module)
        for path in [p for p, x in self.foreign.items() if id(x) not in used]:
            self.swap(path, self.foreign.pop(path).base_layer)
        empty = [x for x in self.layers.values() if id(x) not in used and not x.originals.takers]
        for path in dict.fromkeys(layer.path for layer in empty):
            around = self.layers_at(path)
            if all(id(x) not in used for x in around):
                self.swap(path, around[0].frozen)
                for key in [k for k, x in self.layers.items() if x.path == path]:
                    del self.layers[key]


def _inside(wrapper: Any) -> Any:
    return wrapper._modules["original_module" if isinstance(wrapper, SavedModule) else "base_layer"]


def _asked(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not every model has one
        return None
