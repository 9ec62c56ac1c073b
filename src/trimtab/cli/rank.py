"""trimtab rank inspect, mend, resize, suggest"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.rank.suggest import RankEstimate

Adapter = Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base model; by default the one the adapter names.")]
Data = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Held-out rows (.jsonl, .json, .csv): their loss before and after."),
]
Limit = Annotated[int, typer.Option(min=1, help="Only the first so many rows.")]
System = Annotated[str | None, typer.Option(help="System message of rows without one; '' for none.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
TopK = Annotated[int, typer.Option(min=1, help="How many of each layer's strongest directions are looked at.")]
Epsilon = Annotated[float, typer.Option(min=0, max=1, help="The cosine below which a direction is an intruder.")]


@quietly
def inspect(
    adapter: Adapter,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not groups of them.")] = False,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw maps and spectra into this file (.png, .svg, .pdf).")] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Load the base, and count intruder dimensions too.")
    ] = False,
    model: Model = None,
    top_k: TopK = 10,
    epsilon: Epsilon = 0.5,
) -> None:
    """Show the ranks an adapter really has: singular values and effective ranks of each layer's change.

    A LoRA needs no base model. With one (--model, or --intruders) other methods work too, and intruder dimensions are
    counted: strong directions of the adapted weight that the base did not have (arXiv 2410.21228).
    """
    common.ready()
    from trimtab.rank import show
    from trimtab.rank.survey import inspect_ranks

    base = _open(adapter, model)[0] if model or intruders else None
    found = inspect_ranks(adapter, base, top_k=top_k, epsilon=epsilon)
    if plot is not None:
        from trimtab.rank.plot import plot_survey

        plot_survey(found, plot)
    if as_json:
        show.emit(found)
        return
    show.survey(found, layers)
    if plot is not None:
        typer.echo(f"Drawn into {plot}")


@quietly
def mend(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new adapter.")],
    model: Model = None,
    data: Data = None,
    limit: Limit = 200,
    system: System = None,
    keep: Annotated[
        float, typer.Option("--lambda", min=0, max=1, help="What is left of an intruder: 0 takes it out.")
    ] = 0.75,
    top_k: TopK = 10,
    epsilon: Epsilon = 0.5,
    as_json: Json = False,
) -> None:
    """Scale a LoRA's intruder dimensions down, for what the base knew before; the rank stays.

    Give held-out rows of the task, or text of another kind, to see what it costs and brings.
    """
    common.ready()
    from trimtab.rank import show
    from trimtab.rank.intruders import mend_adapter

    base, tokenizer = _open(adapter, model)
    done = mend_adapter(adapter, base, output, top_k, epsilon, keep, _scorer(base, tokenizer, data, limit, system))
    show.emit(done) if as_json else show.mended(done)


@quietly
def resize(
    adapter: Adapter,
    rank: Annotated[int | None, typer.Option(help="This rank in every layer; smaller ones grow, exactly.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each layer's energy, such as 0.95.")] = None,
    global_: Annotated[
        float | None, typer.Option("--global", help="Keep this share of all layers' energy together.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Keep what fits a weights' file of this size, such as 2MB.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the new adapter; without it nothing is written.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not groups of them.")] = False,
    model: Model = None,
    data: Data = None,
    limit: Limit = 200,
    system: System = None,
    as_json: Json = False,
) -> None:
    """Cut a LoRA down to another rank, or grow it, and say what is lost. The base model is not needed.

    Energy is the sum of the squares of the singular values. The file is PEFT's, with rank_pattern and alpha_pattern
    where layers differ; a layer that keeps nothing is left out of it.
    """
    common.ready()
    from trimtab.rank import show
    from trimtab.rank.resize import resize_adapter

    if data is not None and output is None:
        raise typer.BadParameter("to measure the new adapter it must be written: give --output, too")
    score = _scorer(*_open(adapter, model), data, limit, system) if data is not None else None
    size = _bytes(max_size) if max_size is not None else None
    done = resize_adapter(adapter, rank, energy, global_, size, output, score)
    show.emit(done) if as_json else show.resized(done, layers)


@quietly
def suggest(
    model: Annotated[str, typer.Option("--model", "-m", help="Base model: folder, Hub id, GGUF file, packaged model.")],
    data: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The rows to train on (.jsonl, .json, .csv).")
    ],
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Look at the gradients of some rows, too: about a minute.")
    ] = False,
    system: System = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows the estimate takes.")] = 64,
    energy: Annotated[float, typer.Option(help="The share of a gradient's energy that a rank is to hold.")] = 0.9,
    as_json: Json = False,
) -> None:
    """Say which rank a task asks for: by its size in a second, with --estimate by its gradients too.

    LoRA does well while its parameters are at least the tokens it is trained on.
    """
    common.ready()
    from trimtab.rank import show
    from trimtab.rank.suggest import config_of, estimate_ranks, suggest_rank
    from trimtab.train.data import batch_plan, encode_rows, read_rows
    from trimtab.train.loop import loss_of

    tokenizer = _tokenizer(model)
    examples = encode_rows(read_rows(data), tokenizer, too_long="truncate", system=system)
    base = _load(model) if estimate else _shapes(model)
    said = suggest_rank(base, sum(e.trained for e in examples))
    estimates: list[RankEstimate] = []
    if estimate:
        # Rows from all over the file, batched as in training.
        some = examples[:: max(1, len(examples) // rows)][:rows]
        batches = [[some[i] for i in batch] for batch in batch_plan(some, 4)]
        pad = tokenizer.pad_token_id or 0
        estimates = estimate_ranks(base, batches, energy, loss=lambda m, batch: loss_of(m, batch, pad))
    if as_json:
        show.emit({"suggestion": said, "estimates": estimates, "config": config_of(estimates) if estimates else None})
        return
    show.suggestion(said, len(examples))
    if estimates:
        show.estimates(estimates, energy)


# ---------------------------------------------------------------------- models and data
def _open(adapter: str, model: str | None) -> tuple[Any, Any]:
    """The base of an adapter, and its tokenizer where it has one."""
    from trimtab.core.config import PeftConfig
    from trimtab.errors import BaseModelError
    from trimtab.train.provenance import check_provenance

    config = PeftConfig.from_pretrained(adapter)
    name = model or config.base_model_name_or_path
    if not name:
        raise BaseModelError(f"The adapter {adapter} does not name its base model: give it (--model).")
    base, tokenizer = _load(name, config), _tokenizer(name, needed=False)
    for line in check_provenance(adapter, base, name):
        common.note(f"Warning: {line}")
    return base, tokenizer


def _load(name: str, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    from trimtab.errors import BaseModelError
    from trimtab.files.sources import resolve_base
    from trimtab.shell.auto import AutoPeftModel

    cls = AutoModelForCausalLM
    task = getattr(getattr(config, "task_type", None), "value", getattr(config, "task_type", None))
    if task is not None or getattr(config, "auto_mapping", None):
        cls = AutoPeftModel._base_class(config, task, name, ())
    try:
        return cls.from_pretrained(resolve_base(name), dtype="float32").eval()
    except (OSError, ValueError) as e:
        raise BaseModelError(f"The model {name} cannot be loaded: {e}") from e


def _shapes(name: str) -> Any:
    """The model without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimtab.errors import BaseModelError
    from trimtab.files.sources import resolve_base

    try:
        config = AutoConfig.from_pretrained(resolve_base(name))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as e:
        raise BaseModelError(f"The model {name} cannot be read: {e}") from e


def _tokenizer(name: str, needed: bool = True) -> Any:
    from transformers import AutoTokenizer

    from trimtab.errors import BaseModelError
    from trimtab.files.sources import resolve_base

    try:
        return AutoTokenizer.from_pretrained(resolve_base(name))
    except (OSError, ValueError) as e:
        if needed:
            raise BaseModelError(f"The tokenizer of {name} cannot be loaded: {e}") from e
        return None


def _scorer(
    base: Any, tokenizer: Any, data: Path | None, limit: int, system: str | None
) -> Callable[..., float] | None:
    """Held-out loss of the adapter in a folder, on the base; None without data."""
    if data is None:
        return None
    from trimtab.errors import BaseModelError
    from trimtab.shell.peft_model import PeftModel
    from trimtab.train.data import encode_rows, read_rows
    from trimtab.train.evaluate import evaluate_loss

    if tokenizer is None:
        raise BaseModelError("The base model has no tokenizer beside its weights: rows cannot be encoded.")
    examples = encode_rows(read_rows(data)[:limit], tokenizer, too_long="truncate", system=system)

    def score(folder: str | os.PathLike[str]) -> float:
        wrapped = PeftModel.from_pretrained(base, folder)
        try:
            return evaluate_loss(wrapped, examples, tokenizer.pad_token_id or 0).loss
        finally:
            wrapped.unload()

    return score


def _bytes(text: str) -> int:
    """A size such as "2MB", "500 kB", "1.5MiB" or "2000000"."""
    import re

    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        return int(float(match[1]) * units[match[2].lower()])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise typer.BadParameter(f"'{text}' is no size: give one such as 2MB, 500kB or 2000000.") from None
