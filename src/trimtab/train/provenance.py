"""Where an adapter comes from, written beside it, and whether a model is the one it was trained on.

`trimtab.json` holds the base's name, revision and fingerprint, the digests of chat template and rows, the versions of
what trained it, its settings and its scores. Nothing of it is needed to load the adapter.

The fingerprint is cheap and of the loaded weights: for 16 of the base's floating-point tensors, spread over the model,
the SHA-256 of its shape and of 256 values of it, as bf16. So it is the same for a model that was loaded as fp32 and as
bf16, from safetensors and from GGUF; it does not see a change of other tensors or values, and it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAME = "trimtab.json"
TENSORS, VALUES = 16, 256
TEMPLATE = "chat_template_sha256"
PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "trl")

__all__ = ["NAME", "check_provenance", "fingerprint", "provenance", "read_provenance"]


def provenance(
    base: str, revision: str | None, prints: Mapping[str, str], tokenizer: Any, **more: Any
) -> dict[str, Any]:
    """What `trimtab.json` holds.

    Args:
        revision: the base's on the Hub: what was asked for, or the commit that came.
        prints: the base's fingerprint, taken before it was adapted.
        more: data, settings, scores: anything that is plain.
    """
    return {
        "base_model": {"name": base, "revision": revision, "fingerprint": dict(prints)},
        TEMPLATE: _template(tokenizer),
        "versions": _versions(),
        **more,
    }


def fingerprint(model: nn.Module) -> dict[str, str]:
    """{tensor of the base: hash of its shape and of some of its values}."""
    tensors = base_tensors(model)
    names = sorted(n for n, t in tensors.items() if _readable(t))
    chosen = names[:: max(1, -(-len(names) // TENSORS))]
    return {name: _hash(tensors[name]) for name in chosen}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter} of the base, under the names it has without adapters."""
    adapters = set(getattr(model, "peft_config", ()))
    base: Any = getattr(model, "get_base_model", lambda: model)()
    named = base.named_parameters()
    inside = (".base_layer.", ".original_module.")
    plain = {n: p for n, p in named if not adapters & set(n.split("."))}
    return {n.replace(inside[0], ".").replace(inside[1], "."): p for n, p in plain.items()}


def read_provenance(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """What stands beside an adapter; nothing where it was trained by another tool, or is not in a folder."""
    path = Path(adapter) / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_provenance(
    adapter: str | os.PathLike[str], model: nn.Module, name: str | None = None, tokenizer: Any = None
) -> list[str]:
    """Sentences on how the model differs from the one the adapter was trained on; none where nothing is known to.

    Args:
        adapter: its folder.
        model: the base, or a model with adapters on it that have not changed the base's own weights.
        name: what the model is called in the sentences; by default its own name.
        tokenizer: the one that is used, whose chat template is compared, too.
    """
    content = read_provenance(adapter)
    then = content.get("base_model")
    then = then if isinstance(then, dict) else {}
    prints, tensors = then.get("fingerprint"), base_tensors(model)
    prints = prints if isinstance(prints, dict) else {}
    common = {n: p for n, p in prints.items() if n in tensors and _readable(tensors[n])}
    other = [n for n, p in common.items() if _hash(tensors[n]) != p]
    trained = f"The adapter {os.fspath(adapter)} was trained on {then.get('name')}"
    name = name or str(getattr(model, "name_or_path", "") or "another model")
    said = []
    if prints and not prints.keys() & tensors.keys():
        said.append(f"{trained}; you loaded {name}, which has none of the tensors that its fingerprint is of.")
    if other:
        said.append(f"{trained}; you loaded {name}, and {len(other)} of {len(common)} tensors compared differ from it.")
    if tokenizer is not None and TEMPLATE in content and content[TEMPLATE] != _template(tokenizer):
        said.append(f"The adapter {os.fspath(adapter)} was trained with another chat template than that of {name}.")
    return said


def _template(tokenizer: Any) -> str | None:
    """The hash of a tokenizer's chat template, if it has one."""
    template = getattr(tokenizer, "chat_template", None)
    template = json.dumps(template, sort_keys=True) if isinstance(template, dict | list) else template
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def _readable(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are the weights themselves: not on the meta device, not quantised."""
    return tensor.is_floating_point() and not tensor.is_meta and (type(tensor.data) is Tensor or _sharded(tensor))


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _hash(tensor: Tensor) -> str:
    full: Any = tensor.full_tensor() if _sharded(tensor) else tensor  # type: ignore[attr-defined]
    flat = full.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // VALUES)][:VALUES].to("cpu", torch.bfloat16)
    content = json.dumps(list(full.shape)).encode() + picked.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
