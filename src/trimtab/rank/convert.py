"""Any adapter whose change is one of weights, as a LoRA: the SVD of its dW, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import require_rank
from trimtab.core.targets import inside, matches
from trimtab.errors import ConfigError
from trimtab.files import store
from trimtab.files.codec import ADDED, PREFIX
from trimtab.layer.face import CONVERTED
from trimtab.methods import config_class
from trimtab.rank.adapter_file import AdapterFile, Pair
from trimtab.rank.changes import Change, changes
from trimtab.rank.spectrum import ROUNDING, energy_rank
from trimtab.shell.state import get_peft_model_state_dict, locate_graft

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
ALONG = ("modules_to_save", "bias", "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out")


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """A LoRA that does what an adapter of any method does, as nearly as its rank allows.

    dW = W' - W by the method's formula, so that LoHa, LoKr, VeRA, OFT, IA3, DoRA ... all convert, on every kind of
    layer that a LoRA can change. A change of a bias becomes LoRA's own bias, exactly. The scale is 1 everywhere.

    Args:
        model: a PeftModel or a model that adapters were injected into; it stays as it is.
        rank: the rank of every layer; or, as a float above 0 and up to 1, the share of the energy (the sum of the
            squares of the singular values) that each layer keeps with the lowest rank that does.
        adapter_name: which adapter.
        progressbar: show which layer is at hand.
        compile_kwargs: arguments of torch.compile for the conversion of a layer.

    Returns:
        (its LoraConfig, its tensors by their keys on disk).

    Raises:
        TypeError: nothing there is a change of weights (prompts), or something is one that LoRA cannot make (norms).
        ConfigError: a rank that no layer can have.
    """
    check_rank(rank)
    adapter = locate_graft(model)[0].require(adapter_name)
    found = list(changes(model, adapter_name))
    _check(adapter, found)
    for change in found if isinstance(rank, int) else ():
        change.site.down(rank)  # raises where a grouped convolution cannot have it
    if not isinstance(rank, float) and (small := [c for c in found if rank > min(c.site.fan_out, c.site.fan_in)]):
        shape = (small[0].site.fan_out, small[0].site.fan_in)
        raise ConfigError(
            f"The chosen rank {rank} is larger than '{small[0].path}' {shape} can have: choose a lower one."
        )
    svd = torch.compile(_svd, **compile_kwargs) if compile_kwargs is not None else _svd
    pairs, biases = {}, {}
    for change in _shown(found) if progressbar else found:
        pairs[change.path] = _pair(change, rank, svd)
        if (bias := change.bias_delta()) is not None:
            biases[change.path] = bias.float().cpu()
    rest = _beside(model, adapter)
    if biases and (without := [c.path for c in found if c.site.kind in ("embedding", "parameter")]):
        raise TypeError(f"A LoRA with biases ('{next(iter(biases))}') cannot adapt '{without[0]}', which has none.")
    for path, pair in pairs.items() if biases else ():
        rest[f"{pair.stem}.lora_B.bias"] = biases.get(path, torch.zeros(pair.B[..., 0].numel()))
    file = AdapterFile(_config(adapter.config, found, bool(biases)), {}, rest).with_pairs(pairs)
    return file.config, {key: tensor.clone() for key, tensor in file.tensors.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write the LoRA of `convert_to_lora` into a folder, from where `PeftModel.from_pretrained` loads it."""
    if Path(path).is_file():
        raise ConfigError(f"'{path}' is a file: an adapter is written to a folder.")
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    store.save(store.writers(Path(path), config, tensors))


def check_rank(rank: int | float) -> None:
    """Raise `ConfigError` unless it is a whole rank, or a share of the energy."""
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ConfigError(
                "If rank is a float, it is interpreted as a threshold of the energy. It must be between 0 and 1 but "
                f"got {rank}."
            )
    elif rank == 0:
        raise ConfigError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    else:
        require_rank(None if isinstance(rank, bool) else rank, "rank")


def _check(adapter: Any, found: list[Change]) -> None:
    if not found:
        raise TypeError(
            "Could not detect any layer that supports LoRA conversion: adapter "
            f"'{adapter.name}' changes the weight of none."
        )
    other = sorted(
        {f"{type(m).__name__} at '{c.path}'" for c in found if c.site.kind not in CONVERTED for m in c.methods}
    )
    if other:
        raise TypeError(f"These changes are none that a LoRA can make: {', '.join(other[:5])}.")
    if adapter.method.mutates(adapter.config):
        raise ConfigError(
            f"Adapter '{adapter.name}' changed the base's weights at its start: save it with "
            "path_initial_model_for_weight_conversion, which makes a LoRA of the plain base."
        )


def _pair(change: Change, rank: int | float, svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Pair:
    """One layer's dW as factors of scale 1: A orthonormal, B with the singular values."""
    site, D = change.site, change.delta()
    form = "stack" if D.ndim > 2 else "groups" if site.groups > 1 else "one"
    U, S, Vh = svd(D if D.ndim > 2 else D.unflatten(0, (site.groups, -1)))  # of (n, out, in)
    if isinstance(rank, float):
        r = max(1, energy_rank(S.square().sum(0), rank, noise=ROUNDING * max(D.shape[-2:])))
    else:
        r = rank // site.groups
    times = ADDED["lora_B"] if site.reads else 1
    A, B = Vh[:, :r], U[..., :r] * S[:, None, :r] / times
    return Pair(
        change.path, PREFIX + change.place, A.float().cpu(), B.float().cpu(), scale=1.0, alpha=r * site.groups,
        embedding=site.kind == "embedding", form=form, kernel=site.down(site.groups)[1:] if site.kernel else (),
    )  # fmt: skip


def _svd(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(D, full_matrices=False)


def _config(source: Any, found: list[Change], biased: bool) -> Any:
    """A LoraConfig that selects the same layers."""
    config: Any = config_class("LORA")(task_type=source.task_type, lora_bias=biased)  # type: ignore[call-arg]
    for field in (*SELECTION, *ALONG):
        if getattr(source, field, None):
            setattr(config, field, getattr(source, field))
    modules = {c.path for c in found if c.site.kind != "parameter"}
    if any(matches(config.target_modules, path) is None for path in modules):  # some come along with others
        config.target_modules, config.exclude_modules = modules, None
        config.layers_to_transform = config.layers_pattern = None
    config.target_parameters = [c.path for c in found if c.site.kind == "parameter"] or None
    return config


def _beside(model: nn.Module, adapter: Any) -> dict[str, Tensor]:
    """What the adapter's file holds beside its method's own tensors: modules trained whole, biases of the base."""
    whole = getattr(adapter.config, "modules_to_save", None)
    found = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter.name, save_embedding_layers=False).items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        if inside(whole, path) or (name == "bias" and "lora_B" not in key and adapter.biases is not None):
            found[key] = tensor.detach()
    return found


def _shown(found: list[Change]) -> Iterator[Change]:
    from rich.progress import track

    yield from track(found, "Converting to LoRA")
