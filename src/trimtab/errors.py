"""Every exception and warning of trimtab.

PeftError(Exception)
├── ConfigError(ValueError)                 a field of a config has a value that cannot work
├── NoMatchingPeftModuleError(ValueError)   no module of the model fits the config's targets
├── AdapterNameError(KeyError, ValueError)  a name that is taken, unknown, or cannot name a folder and a module
├── AdapterFileError(RuntimeError, ValueError)  files that are missing, damaged, or do not fit the model
├── ReadOnlyWeight(ValueError)              a number format that can be read but not written
└── RouteError(RuntimeError)                a forward that cannot know which adapter its rows belong to

PeftWarning(UserWarning)                    something works, but probably not as meant
"""

from __future__ import annotations


class PeftError(Exception):
    """Base of every error trimtab raises on purpose."""


class ConfigError(PeftError, ValueError):
    """A field of a config has a value that cannot work; the message names the field and the ways out."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module of the model fits the config's targets; the message names the nearest ones."""


class AdapterNameError(PeftError, KeyError, ValueError):
    """An adapter name that is taken, unknown, or cannot name a folder and a module."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class AdapterFileError(PeftError, RuntimeError, ValueError):
    """Adapter files that are missing, damaged or do not fit the model; lists every fault at once."""


class ReadOnlyWeight(PeftError, ValueError):
    """The weight's number format can be read but not written; the message says what to do instead."""


class RouteError(PeftError, RuntimeError):
    """A forward pass that cannot know which adapter its rows belong to."""


class PeftWarning(UserWarning):
    """Something works, but probably not as meant."""
