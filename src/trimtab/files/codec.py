"""The only file that knows how PEFT names an adapter's tensors, in memory and on disk. One table serves both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.fields import LARGEST
from trimtab.core.method import Method, leaf_template
from trimtab.core.targets import matches
from trimtab.errors import AdapterFileError
from trimtab.formats import offload
from trimtab.methods import prefix_of

PREFIX = "base_model.model."  # of every key on disk that belongs to a module of the base model

# Leaves whose name on disk is not their name in memory without the adapter.
ON_DISK = {"lora_magnitude_vector.{}.weight": "lora_magnitude_vector"}

# Prefixes of leaves under which keys on disk have "default" where those in memory have the adapter's name.
NAMED = ("shadow_",)

# What PEFT writes beside the tensors it means: with bias="all", biases of modules it saves whole under these names too.
IGNORED = (".original_module.", ".modules_to_save.")

# Segments of keys that stand for what another library has wrapped around a module: compiling, checkpointing, sharding.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")

# PEFT 0.21 adds the update of an attention's output projection to its weight twice, in every forward and merge: what
# its files mean is twice their B. Here W' = W + s·B·A, so B is halved on disk; both libraries then compute the same.
ADDED = {"lora_B": 2}

# Names of embeddings whose base weight is saved along when it is adapted or resized.
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens", HEAD)


@dataclass
class Prompt:
    """Holder of a prompt's tensors, which are saved as what comes out of its method."""

    method: Any


@dataclass(slots=True)
class Slot:
    """One tensor of an adapter: its key in the model's state dict, its key on disk, and where it lives.

    `holder` is a module that has the tensor under `name`, or a dict that has it under that key.
    """

    memory: str
    disk: str
    holder: Any
    name: str
    optional: bool = False  # the file need not have it
    shared: bool = False  # belongs to the adapter as a whole: its key stands beside "model.", not below it
    bare: bool = False  # its key has no prefix at all (prompts)
    method: Any = None  # whose tensor it is, under the name `leaf`: it may keep another shape in memory than on disk
    leaf: str = ""
    state: bool = False  # of the state of training: kept in checkpoints, not in the adapter's file
    echo: bool = False  # a tied layer keeps the tensor, and its file has it there, too

    def on_disk(self, prefix: str = PREFIX) -> str:
        """The whole key on disk; `prefix` is what stands before a module's path."""
        return (self._prefix(prefix) if self.bare or self.shared else prefix) + self.disk

    def in_memory(self, prefix: str = PREFIX) -> str:
        """The whole key in a state dict of the object whose keys have `prefix`."""
        return self._prefix(prefix) + self.memory

    def _prefix(self, prefix: str) -> str:
        if self.bare:
            return ""
        return prefix.removesuffix("model.") if self.shared and f".{prefix}".endswith(".model.") else prefix

    def get(self) -> Tensor:
        """The tensor as it stands."""
        if isinstance(self.holder, Prompt):
            return self.holder.method.saved()[self.name]  # type: ignore[no-any-return]
        if isinstance(self.holder, Mapping):
            return self.holder[self.name]  # type: ignore[no-any-return]
        tensor: Tensor = self.holder._parameters.get(self.name)
        return self.holder._buffers[self.name] if tensor is None else offload.value(self.holder, self.name, tensor)

    def packed(self, tensor: Tensor) -> Tensor:
        """The tensor, or one that stands for it, in its shape on disk."""
        if self.method is None:
            return tensor
        if self.method.padded:  # held in more room than its rank, for hot-swapping
            tensor = tensor[tuple(slice(n) for n in self.method.declared[self.leaf].shape)]
        packed: Tensor = self.method.pack(self.leaf, tensor)
        return packed if (times := self._times) == 1 else packed / times

    def unpacked(self, value: Tensor) -> Tensor:
        """A value from disk in the shape it has here."""
        if self._as_it_is:
            return value
        unpacked: Tensor = self.method.unpack(self.leaf, value)
        if self.method.padded and unpacked.ndim == (own := self.get()).ndim:
            room = [max(n - m, 0) for n, m in zip(own.shape, unpacked.shape, strict=True)]
            unpacked = nn.functional.pad(unpacked, [side for n in reversed(room) for side in (0, n)])
        return unpacked if (times := self._times) == 1 else unpacked * times

    @property
    def _as_it_is(self) -> bool:
        """Whether a value from disk is the tensor, number for number: so it is with most."""
        method = self.method
        return method is None or (type(method).unpack is Method.unpack and not (method.padded or method.site.reads))

    @property
    def _times(self) -> int:
        """How often PEFT adds the product this tensor is a factor of to the weight."""
        return ADDED.get(self.leaf.partition(".")[0], 1) if self.method.site.reads else 1

    def takes(self, value: Tensor) -> bool:
        """Whether a value from disk fits; nothing is changed."""
        own = self.get()
        shape = value.shape if self._as_it_is else self.unpacked(value.to("meta")).shape
        return shape == own.shape and value.is_complex() == own.is_complex()

    @property
    def trains(self) -> bool:
        """Whether it is numbers of the adapter's own, or trained ones: a copied module may hold a mask as well."""
        return self.method is not None or self.shared or self.bare or isinstance(self.get(), nn.Parameter)

    def put(self, value: Tensor) -> None:
        """Copy a value into the tensor, outside autograd; one that was built without storage takes the value itself."""
        if isinstance(self.holder, Prompt):
            self.holder.method.restore(self.name, value)
            return
        value, old = self.unpacked(value), self.get()
        if self.echo:
            apart = old.device.type != "meta" and not torch.equal(value := value.to(old.device, old.dtype), old)
            if apart and bool((torch.stack([value, old]).abs() <= LARGEST).all()):  # others are damaged: `unsound`
                raise AdapterFileError(
                    f"'{self.disk}' is not what the file has for the layer that is tied to it, and they are one here. "
                    "Where the config says `ensure_weight_tying`, ensure_weight_tying=False keeps them apart."
                )
            return
        if isinstance(self.holder, nn.Module) and offload.hook(self.holder) is not None:  # the base's own
            offload.install(self.holder, {self.name: nn.Parameter(value.to(old.dtype), requires_grad=False)})
            return
        if not old.is_meta:
            old.copy_(sharded(value, old))
            return
        new = value.to(dtype=old.dtype, device=value.device if self.method is None else self.method.site.device)
        new = new.clone() if new is value else new
        new = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        if isinstance(self.holder, Mapping):
            self.holder[self.name] = new  # type: ignore[index]
        else:
            (self.holder._parameters if isinstance(new, nn.Parameter) else self.holder._buffers)[self.name] = new


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole: those that are sharded over processes are gathered, in which every process takes part."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}


def sharded(value: Tensor, like: Any) -> Tensor:
    """A whole value cut as `like` is, where that is sharded over processes; each process has the value, none sends."""
    if type(like) is nn.Parameter or not hasattr(like, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def leaf_keys(path: str, template: str, adapter: str) -> tuple[str, str]:
    """(key in memory, key on disk) of a leaf of the layer at `path`, both without prefix."""
    return f"{path}.{template.format(adapter)}", f"{path}.{_disk(template)}"


@lru_cache(1024)
def _disk(template: str) -> str:
    return ON_DISK.get(template, template.replace(".{}", ".default" if template.startswith(NAMED) else ""))


def shared_keys(name: str, adapter: str) -> tuple[str, str]:
    """(key in memory, key on disk) of a tensor that an adapter keeps once, both without prefix."""
    template = leaf_template(name)
    return template.format(adapter), template.format("default") if name.startswith(NAMED) else name


def copy_keys(path: str, name: str, adapter: str) -> tuple[str, str]:
    """(key in memory, key on disk) of tensor `name` of a module that is trained and saved whole."""
    return f"{path}.modules_to_save.{adapter}.{name}", f"{path}.{name}"


def copies_held(names: Iterable[str], model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The entries of `modules_to_save` that a file was written for: PEFT's mean every path that ends in their letters.

    LongLoRA's "norm" stands for `input_layernorm`, too: modules like that are named, where the file holds them.
    """
    wanted = list(names)
    endings = tuple(wanted)
    for path, module in model.named_modules() if endings else ():
        if not path.endswith(endings) or matches(set(wanted), path) is not None:
            continue
        if any(f"{PREFIX}{path}.{name}" in tensors for name, _ in module.named_parameters(recurse=False)):
            wanted.append(path)
    return wanted


def unwrapped(key: str) -> str:
    """A key without what wrappers add to it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def modules_of(keys: Iterable[str], peft_type: str) -> set[str]:
    """The paths of the modules that tensors of a method belong to, read off their keys in memory or on disk."""
    start, found = prefix_of(peft_type), set()
    for key in keys:
        parts = unwrapped(key.removeprefix(PREFIX)).split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(start)), 0)
        if at:
            found.add(".".join(part for part in parts[:at] if part != "base_layer"))
    return found


def as_written(key: str, model: nn.Module) -> str:
    """A key on disk without what wrappers inside the model add to it; one called "module" that is none stays."""
    if not any(f"{wrapper}." in key for wrapper in WRAPPERS):
        return key
    written: list[str] = []
    module: Any = model
    for part in key.removeprefix(PREFIX).split("."):
        around = "DataParallel" in type(module).__name__
        module = module._modules.get(part) if isinstance(module, nn.Module) else None
        if part not in WRAPPERS[:-1] and not (part == WRAPPERS[-1] and around):
            written.append(part)
    return key[: len(PREFIX) * key.startswith(PREFIX)] + ".".join(written)


def aligned(
    slots: Iterable[Slot],
    tensors: Mapping[str, Tensor],
    adapter: str,
    prefix: str = PREFIX,
    rename: Callable[[str], str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file by the keys its adapter has on disk, whatever form they have there.

    A key that is none of the adapter's own is read as one in memory (with an adapter's name in it, any one), without
    what wrappers add, without the prefix, and through `rename`; a key that is nothing to the adapter stays as it is.
    """
    wanted = {slot.on_disk(prefix): slot for slot in slots}
    if tensors.keys() <= wanted.keys():
        return dict(tensors)
    plain = {unwrapped(key): key for key in wanted}
    infixed: dict[tuple[int, str], str] = {}  # where an adapter's name stands in a key in memory, and the rest of it
    for key, slot in wanted.items():
        parts = unwrapped(slot.in_memory(prefix)).split(".")
        at = len(parts) - 1 - parts[::-1].index(adapter) if adapter in parts else len(parts)
        infixed[at, ".".join(parts[:at] + parts[at + 1 :])] = key
    found = {key: value for key, value in tensors.items() if key in wanted}
    read: dict[str, dict[str, str]] = {}  # key on disk -> {adapter it is of: key in the file}
    for key in tensors.keys() - found.keys():
        for text in dict.fromkeys([key, rename(key) if rename else key, f"{prefix}{key}"]):
            name, parts = unwrapped(text), unwrapped(text).split(".")
            hits = (
                {adapter: plain[name]}
                if name in plain
                else {
                    parts[i]: infixed[i, rest]
                    for i in range(len(parts))
                    if (i, rest := ".".join(parts[:i] + parts[i + 1 :])) in infixed
                }
            )
            for of, target in hits.items():
                read.setdefault(target, {})[of] = key
            if hits:
                break
    taken = set()
    for target, keys in read.items():
        chosen = keys.get(adapter) or (next(iter(keys.values())) if len(keys) == 1 else None)
        if chosen is not None and target not in found:
            found[target] = tensors[chosen]
            taken.add(chosen)
    return found | {key: value for key, value in tensors.items() if key not in found and key not in taken}


def from_state(
    slots: Iterable[Slot], state: Mapping[str, Tensor] | None, name: str, model: nn.Module, prefix: str = PREFIX
) -> dict[str, Tensor]:
    """{key on disk: tensor} of an adapter, taken from the model, or from a state dict of it, whose keys have any form.

    Raises:
        AdapterFileError: the state dict lacks some of them, or they are held in pieces by several processes.
    """
    slots = list(slots)
    plain = {unwrapped(key): key for key in state or ()}
    found, lacking = {}, []
    for slot in slots:
        disk = slot.on_disk(prefix)
        key = next(
            (k for form in (slot.in_memory(prefix), slot.memory, disk) if (k := plain.get(unwrapped(form)))), None
        )
        own = state is None or slot.bare
        value: Any = slot.get() if own else None if key is None else state[key]  # type: ignore[index]
        whole = own or key is None or unwrapped(key) != unwrapped(disk)  # what a method left out may be all there was
        if value is None or value.device.type == "meta" or (whole and not value.numel() and _size(slot.get())):
            lacking.append(slot.in_memory(prefix))
        else:
            found[as_written(disk, model)] = slot.packed(value) if whole else value
    if lacking:
        raise AdapterFileError(
            f"{'The model' if state is None else 'The state dict'} lacks {len(lacking)} of the {len(slots)} tensors of "
            f"adapter '{name}', or has them empty: {_some(lacking)}. Nothing is saved. Pass a whole state dict (from "
            "all processes, frozen parameters included), or save only the adapters it has (`selected_adapters`)."
        )
    return found


def _size(tensor: Any) -> int:
    """The number of entries of a tensor, that of the whole where DeepSpeed keeps it in pieces."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


@dataclass
class Fit:
    """How the tensors of a file fit an adapter; keys as on disk, without the prefix of the model's own class."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    trained: bool = True  # whether any of the missing is

    def raise_for_faults(self, source: str, ignore_mismatched: bool = False) -> None:
        """Raise one `AdapterFileError` that lists everything that does not fit."""
        faults = []
        if self.missing:
            faults.append(f"missing keys (the adapter has them, the file does not): {_some(self.missing)}")
        if self.unexpected:
            faults.append(f"unexpected keys (nothing in the model takes them): {_some(self.unexpected)}")
        if self.mismatched and not ignore_mismatched:
            shapes = [f"{k} is {found} in the file and {wanted} in the model" for k, found, wanted in self.mismatched]
            faults.append(f"size mismatch: {_some(shapes)}")
        if faults:
            advice = "Check that the base model is the one it was trained on, or pass strict=False to load what fits."
            if self.missing and len(faults) == 1 and not self.trained:
                advice = (
                    "None of these is trained: the file may be of an earlier version. With strict=False they are what "
                    "a new adapter starts with."
                )
            raise AdapterFileError(f"The adapter in {source} does not fit the model: {'; '.join(faults)}. {advice}")


def whole_model(keys: Iterable[str]) -> bool:
    """Whether these are of a file that PEFT 0.21 writes beside a router, with parts of the base model in it."""
    return any(key.startswith("base_model.lora_model.") for key in keys)


def fit(slots: Iterable[Slot], tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> Fit:
    """Compare the tensors of a file with the slots of an adapter. Nothing is changed."""
    slots = list(slots)
    wanted = {s.on_disk(prefix): s for s in slots}
    once = {s.disk for s in slots if s.shared}  # which PEFT 0.21 may write again below a layer
    mismatched = [
        (key, tuple(tensors[key].shape), tuple(slot.get().shape))
        for key, slot in wanted.items()
        if key in tensors and not slot.takes(tensors[key])
    ]
    missing = [k for k, slot in wanted.items() if k not in tensors and not (slot.optional or slot.echo)]
    return Fit(
        missing=missing,
        unexpected=[
            k
            for k in tensors
            if k not in wanted and k.rpartition(".")[2] not in once and not any(part in k for part in IGNORED)
        ],
        mismatched=mismatched,
        trained=any((s := wanted[k]).method is None or s.method.declared[s.leaf].train for k in missing),
    )


@torch.no_grad()
def fill(slots: Iterable[Slot], tensors: Mapping[str, Tensor], prefix: str = PREFIX, checked: bool = False) -> None:
    """Copy every tensor that has a slot of its shape; those that were `checked` all have."""
    for slot in slots:
        value = tensors.get(slot.on_disk(prefix))
        if value is not None and (checked or slot.takes(value)):
            slot.put(value)


def _some(items: list[Any], limit: int = 10) -> str:
    shown = ", ".join(str(i) for i in items[:limit])
    return f"[{shown}{f', and {len(items) - limit} more' if len(items) > limit else ''}]"
