"""trimtab version"""

from __future__ import annotations

import typer

# importlib.metadata is loaded where it is wanted: it is a good part of the time of --help


def version() -> None:
    """Show the versions of trimtab and of the libraries it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for package in ("trimtab", "torch", "transformers", "safetensors", "huggingface_hub"):
        try:
            typer.echo(f"{package} {installed(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def show_version() -> None:
    """Show trimtab's own version, and end."""
    from importlib.metadata import version as installed

    typer.echo(installed("trimtab"))
    raise typer.Exit
