"""Adapters folded into their base, saved as a whole model, with a receipt: how far the saved model's logits are off."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trimtab.core.io import locate
from trimtab.errors import ExportError
from trimtab.files.store import PICKLED, WEIGHTS
from trimtab.shell.convert import dequantize, keep_reversible, merge_error
from trimtab.shell.opening import Opened

RECEIPT = "merge_receipt.json"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\nI am writing to",
    '{"name": "Ada", "born": ',
)


@dataclass(frozen=True)
class Receipt:
    """What was merged, how, and what it cost. The saved model was loaded again for the figures."""

    base: str
    adapters: dict[str, str]  # name -> folder
    sha256: dict[str, str]  # name -> of its weights
    output: str
    path: list[str]  # number formats on the way: of the base, of the products, of the file
    drift_largest: float  # of a logit, between base with adapters and the saved model
    drift_mean: float
    logit_scale: float  # standard deviation of the logits: what the drift is to be seen beside
    same_choice: float  # share of positions where both would say the same token next
    positions: int
    lost: float | None  # largest share of a layer's change that rounding to a quantised format took
    tokenizer: bool  # whether there was one to copy
    template: bool
    bytes: int
    adapter_bytes: int


def merge(
    opened: Opened,
    output: str | os.PathLike[str],
    prompts: Sequence[str] = PROMPTS,
    dtype: str | None = None,
    dequantise: bool = False,
    allow_quantised: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Receipt:
    """Fold all adapters of an opened model into its base, and save that as a whole model folder, or nothing.

    Args:
        opened: what `open_model` gave; it is used up. Its adapters add up, in their order.
        prompts: texts on which merged and unmerged logits are compared.
        dtype: number format of the saved weights; None: the base's.
        dequantise: give a quantised base plain weights first.
        allow_quantised: merge into the quantised weights, and say what rounding took.
        overwrite: replace `output` where it is there.

    Raises:
        ExportError: nothing to merge, a quantised base, no room on the disk, or an output that is there.
    """
    target = Path(output).expanduser()
    model, wanted = opened.model, None if dtype is None else getattr(torch, dtype, None)
    _check(opened, target, dtype, wanted, dequantise, allow_quantised, overwrite)
    if dequantise and _quantised(model):
        say("Giving the quantised base plain weights")
        dequantize(model)
    _check_room(model, wanted, target)
    held, ids = _dtype(model.get_base_model()), _prompt_ids(opened, prompts)
    say("Computing logits with the adapters beside the base")
    model.set_adapter(list(opened.adapters), inference_mode=True)
    before = [_logits(model, row) for row in ids]
    say(f"Merging {', '.join(opened.adapters)}")
    lost = None
    if _quantised(model):
        model.merge_adapter()
        lost = max(merge_error(model).values(), default=0.0)
    plain = model.merge_and_unload()
    if wanted is not None:
        plain.to(wanted)
    facts = _facts(opened, target) | {
        "path": [held, "float64" if held == "float64" else "float32", _dtype(plain)],
        "lost": lost,
    }
    opened.model = model = None  # what is saved is loaded again: two models at a time are enough
    say(f"Saving to {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as scratch:
        out = Path(scratch) / "model"
        cls = _save(plain, opened.tokenizer, out)
        del plain
        gc.collect()
        say("Loading it again, to compare")
        drift = _drift(before, _reloaded(cls, out, ids))
        receipt = Receipt(**facts, **drift, bytes=sum(f.stat().st_size for f in out.iterdir()))
        (out / RECEIPT).write_text(json.dumps(asdict(receipt), indent=2) + "\n", encoding="utf-8")
        _put(out, target)
    return receipt


def _facts(opened: Opened, target: Path) -> dict[str, Any]:
    """What of the receipt is known before."""
    return {
        "base": opened.base,
        "adapters": opened.adapters,
        "sha256": {name: _sha256(folder) for name, folder in opened.adapters.items()},
        "output": str(target),
        "tokenizer": opened.tokenizer is not None,
        "template": bool(getattr(opened.tokenizer, "chat_template", None)),
        "adapter_bytes": sum(_weights(folder).stat().st_size for folder in opened.adapters.values()),
    }


def _save(plain: Any, tokenizer: Any, folder: Path) -> type:
    """Write model and tokenizer; returns the model's class."""
    try:
        keep_reversible(plain)
        plain.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as e:
        raise ExportError(f"The merged model could not be written: {e}. Nothing is left of it.") from e
    return type(plain)


def _dtype(model: Any) -> str:
    """The number format of a model's weights."""
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def _check(
    opened: Opened,
    target: Path,
    dtype: str | None,
    wanted: torch.dtype | None,
    dequantise: bool,
    allow_quantised: bool,
    overwrite: bool,
) -> None:
    """Raise for everything that would make the merge fail or lie, all of it in one error."""
    faults = []
    if not opened.adapters:
        faults.append(f"{opened.base} has no adapter on it: there is nothing to merge")
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        faults.append(f"'{dtype}' is no number format for weights: float32, bfloat16 or float16")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        faults.append(f"{target} is there already: choose another folder, or overwrite it (--overwrite)")
    prompts = [n for n, c in getattr(opened.model, "peft_config", {}).items() if c.is_prompt_learning]
    if opened.adapters and prompts:
        faults.append(f"{', '.join(prompts)} is a prompt in front of the model, which no weight can hold")
    if opened.adapters and _quantised(opened.model) and not (dequantise or allow_quantised):
        faults.append(
            f"{opened.base} is quantised: its weights cannot hold a change smaller than their steps, so a merge rounds "
            "most of a short training run away. Give it plain weights first (--dequantise; in Python, "
            "trimtab.dequantize(model)), or accept the loss and see it measured (--allow-quantised)"
        )
    if faults:
        raise ExportError("Cannot merge: " + "; ".join(faults) + ".")


def _quantised(model: Any) -> bool:
    from trimtab.formats.weights import quantised

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(quantised(getattr(m, "base_layer", m)) for m in base.modules())


def _check_room(model: Any, wanted: torch.dtype | None, target: Path) -> None:
    """Raise unless the disk has room for the model's weights."""
    each = {t.data_ptr(): t.numel() * (wanted.itemsize if wanted and t.is_floating_point() else t.element_size())
            for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    needs, folder = int(1.02 * sum(each.values())) + 20_000_000, target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise ExportError(
            f"{folder} has {free / 1e6:,.0f} MB free; the merged model takes {needs / 1e6:,.0f} MB. Nothing is written."
        )


def _prompt_ids(opened: Opened, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts; without a tokenizer, ids that any vocabulary has."""
    if opened.tokenizer is not None:
        return [ids for p in prompts if (ids := opened.tokenizer(p).input_ids)]
    size = opened.model.get_base_model().get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, size, (16,), generator=draw).tolist() for _ in prompts]


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:  # (T, V), or what the task's model gives
    device = next(model.parameters()).device
    out = model(input_ids=torch.tensor([ids], device=device))
    return (out.logits if hasattr(out, "logits") else out[0]).float().cpu()


def _reloaded(cls: type, folder: Path, ids: list[list[int]]) -> list[Tensor]:
    model: Any = cls.from_pretrained(folder, dtype="auto").eval()  # type: ignore[attr-defined]
    return [_logits(model, row) for row in ids]


def _drift(before: list[Tensor], after: list[Tensor]) -> dict[str, Any]:
    """The figures of the receipt."""
    a, b = (torch.cat([t.reshape(-1, t.shape[-1]) for t in side]) for side in (before, after))
    if not torch.isfinite(b).all():
        raise ExportError("The merged model's logits are not finite: the adapter or its base is damaged. Not saved.")
    return {
        "drift_largest": float((a - b).abs().max()),
        "drift_mean": float((a - b).abs().mean()),
        "logit_scale": float(a.std()),
        "same_choice": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "positions": len(a),
    }


def _weights(folder: str) -> Path:
    file = locate(folder, WEIGHTS) or locate(folder, PICKLED)
    assert file is not None
    return file


def _sha256(folder: str) -> str:
    with _weights(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(made: Path, target: Path) -> None:
    """Give a finished folder its name; what was there before goes only then."""
    if not target.exists():
        made.rename(target)
        return
    old = made.parent / "old"
    target.rename(old)
    try:
        made.rename(target)
    except OSError:
        old.rename(target)
        raise
