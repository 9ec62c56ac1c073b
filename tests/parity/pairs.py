"""One model adapted twice: by us and by the oracle, with the same base, the same config and the same adapter."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trimtab
from tests.parity.models import batch, build, tensor_of

BOTH = (trimtab, peft)


def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call; its warnings have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def spoken(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """The texts of a call's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(w.message) for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)]


def method(library: Any, kind: str, name: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The model `name` with an adapter of another method than LoRA."""
    torch.manual_seed(11)
    return quiet(library.get_peft_model, build(name, dtype), quiet(getattr(library, f"{kind}Config"), **fields))


def config_of(library: Any, fields: dict[str, Any]) -> Any:
    """A LoraConfig of either library; values are copied, since PEFT changes what it is given."""
    return quiet(library.LoraConfig, **json.loads(json.dumps(fields)))


def adapt(library: Any, name: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The model `name`, adapted by either library."""
    torch.manual_seed(11)
    return quiet(library.get_peft_model, build(name, dtype), config_of(library, fields), **more)


def stir(model: nn.Module, amount: float = 0.2) -> None:
    """Move every trainable parameter off its start by a noise that depends on its name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype), alpha=amount)


def pair(name: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    """(ours, theirs), holding the same numbers under the same names."""
    theirs = adapt(peft, name, fields, dtype, **more)
    stir(theirs)
    ours = adapt(trimtab, name, fields, dtype, **more)
    copy_state(theirs, ours)
    return ours, theirs


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter by its name; both models must have the same ones."""
    wanted, held = parameters(source), parameters(target)
    assert wanted.keys() == held.keys()
    with torch.no_grad():
        for name, parameter in held.items():
            assert parameter.shape == wanted[name].shape, name
            parameter.copy_(wanted[name])


def copy_trained(source: nn.Module, target: nn.Module) -> None:
    """Copy every trained parameter by its name; the target may have others besides."""
    held = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                held[name].copy_(parameter)


def starts_alike(found: Tensor, wanted: Tensor, name: str) -> None:
    """Constants are the same, and what is drawn is as wide."""
    if wanted.std() == 0:
        assert torch.equal(found, wanted), name
    elif wanted.numel() > 100:
        assert 0.7 < found.std() / wanted.std() < 1.4, name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter}, a tied one once.

    The frozen embedding below trained tokens lies one level deeper in PEFT; no file and no trained name shows it.
    """
    return {n.replace(".token_adapter.base_layer.", ".base_layer."): p for n, p in model.named_parameters()}


def trainable(model: nn.Module) -> set[str]:
    """The names of what trains."""
    return {n for n, p in model.named_parameters() if p.requires_grad}


def run(model: nn.Module, name: str, seed: int = 5, **kwargs: Any) -> Tensor:
    """The model's output for the batch of model `name`."""
    torch.manual_seed(seed)
    return tensor_of(model(**batch(name), **kwargs))


def dropping(fields: dict[str, Any]) -> bool:
    """Whether a config has dropout, whose masks are drawn by another rule than PEFT's: equal in distribution only."""
    return bool(fields.get("lora_dropout"))


def gradients(model: nn.Module, name: str, train: bool = True) -> dict[str, Tensor]:
    """Gradients of a loss that every output has a part in."""
    model.train(train)
    model.zero_grad()
    out = run(model, name)
    if not out.requires_grad:
        return {}
    draw = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=draw).to(out.dtype)).float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def load(library: Any, name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The model `name` with the adapter in a folder, by either library."""
    torch.manual_seed(13)
    return quiet(library.PeftModel.from_pretrained, build(name, dtype), str(folder), **more)


def config_file(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` with its lists sorted: sets are written in any order."""
    content = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in content.items()}


def weights_file(folder: Path) -> dict[str, Tensor]:
    """The tensors on disk by key."""
    return load_file(folder / "adapter_model.safetensors")


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, relative to the size of what is compared."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    worst = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
    assert worst <= tolerance * scale, f"differs by {worst:.2e} at a size of {scale:.2e}"


def all_near(mine: dict[str, Tensor], yours: dict[str, Tensor]) -> None:
    """The same names, and `near` by name."""
    assert mine.keys() == yours.keys()
    for key, tensor in yours.items():
        near(mine[key], tensor)
