"""trimtab version"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer


def version() -> None:
    """Show the versions of trimtab and of the libraries it stands on."""
    for package in ("trimtab", "torch", "transformers", "safetensors", "huggingface_hub"):
        try:
            typer.echo(f"{package} {installed(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(installed("trimtab"))
        raise typer.Exit
