"""The `trimtab` command. One file a verb, imported when the verb is asked for; heavy imports are inside the verbs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimtab.cli.help import METAVAR, show
from trimtab.cli.verbs import GROUPS, VERBS, asked, function_of
from trimtab.errors import PeftError

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}  # a method's own fields, and other tools' names


def _words(context: Any) -> str:
    """The verb or group that a context is of, as it was typed after `trimtab`."""
    return "" if context.parent is None else f"{_words(context.parent)} {context.info_name}".lstrip()


class Command(TyperCommand):
    """A verb; its help is ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(_words(ctx))


class Group(TyperGroup):
    """Verbs that are known by name; the one that is asked for is built when it is."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        before = f"{self.name} " if self.name in GROUPS else ""
        own = {key.removeprefix(before): verb for key, verb in VERBS.items() if key.startswith(before)}
        self.commands.update((key, TyperCommand(key, hidden=v.hidden)) for key, v in own.items() if " " not in key)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and not isinstance(command, Group):
            command = _build(f"{_words(ctx)} {name}".lstrip())
        return name, command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(_words(ctx))


def _build(verb: str) -> Any:
    """The command of a verb."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    more: dict[str, Any] = {"context_settings": EXTRA, "options_metavar": METAVAR} if VERBS[verb].run else {}
    alone.command(verb.split()[-1], cls=Command, **more)(function_of(verb))
    return typer.main.get_command(alone)


app = typer.Typer(name="trimtab", cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for group in filter(None, GROUPS):
    app.add_typer(typer.Typer(name=group, cls=Group, no_args_is_help=True))


def _version(wanted: bool) -> None:
    if wanted:
        from trimtab.cli.version import show_version

        show_version()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Adapt large frozen models with a few trained parameters."""


def main() -> None:
    """Entry point of the console script. Errors that trimtab raises on purpose end in one message, not a traceback."""
    try:
        if (name := asked(sys.argv[1:])) is not None:
            show(name)  # the command itself, with what reads its values, is not built for it
        else:
            app()
    except PeftError as e:
        print(f"trimtab: {e}", file=sys.stderr)
        sys.exit(1)
