"""What a verb shows: trimtab's own lines, and not what the libraries below it say of themselves."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from trimtab.errors import PeftWarning

Verbose = Annotated[bool, typer.Option("--verbose", help="Show what other libraries print, too.")]


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Inside the block, other libraries' warnings and progress bars are not shown; errors are, and so are our warnings.

    Imports of torch, transformers and the like belong inside. A download from the Hub keeps its bar: it may take long.
    """
    if verbose:
        yield
        return
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, PeftWarning) and str(message) not in said:
            said.add(str(message))
            print(f"Warning: {message}", file=sys.stderr, flush=True)

    level, bars = logging.root.manager.disable, os.environ.get("TQDM_DISABLE")
    with warnings.catch_warnings(), _without_bars():
        warnings.simplefilter("always", PeftWarning)
        warnings.showwarning = show
        logging.disable(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it once, as it is imported
        try:
            yield
        finally:
            logging.disable(level)
            del os.environ["TQDM_DISABLE"]
            if bars is not None:
                os.environ["TQDM_DISABLE"] = bars


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turn transformers' bars off, where it was imported before and has read the environment already."""
    theirs: Any = sys.modules.get("transformers.utils.logging")
    shown = theirs is not None and theirs.is_progress_bar_enabled()
    if shown:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def quietly(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that runs inside `quiet`, with --verbose as the last of its options."""
    signature = inspect.signature(verb, eval_str=True)
    verbose = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)

    @functools.wraps(verb)
    def run(*args: Any, verbose: bool = False, **given: Any) -> None:
        with quiet(verbose):
            verb(*args, **given)

    parameters = [*signature.parameters.values(), verbose]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run
