"""Every exception and warning of trimtab.

PeftError(Exception)
├── ArgumentError(TypeError, ValueError)    an argument of another kind: a path for a model, two that are swapped
├── ConfigError(ValueError)                 a field of a config has a value that cannot work
├── NoMatchingPeftModuleError(ValueError)   no module of the model fits the config's targets
├── AdapterNameError(KeyError, ValueError)  a name that is taken, unknown, or cannot name a folder and a module
├── AdapterFileError(RuntimeError, ValueError)  files that are missing, damaged, or do not fit the model
├── ReadOnlyWeight(ValueError)              a number format that can be read but not written
│   └── NotMergeable(NotImplementedError)   an adapter that no weight of a layer can stand for
├── RouteError(RuntimeError)                a forward that cannot know which adapter its rows belong to
├── BaseModelError(OSError)                 a base model that cannot be fetched, checked or converted
├── MissingPackageError(ImportError)        a package that only some uses need; the message says how to install it
├── DataError(ValueError)                   rows that cannot be trained on, named by file and line
├── TrainError(RuntimeError)                a run that cannot go on, or cannot be resumed
├── ExportError(RuntimeError)               a model or adapter that cannot be written as asked
└── OptimizerError(ValueError)              an optimiser that does not fit the model's adapters

PeftWarning(UserWarning)                    something works, but probably not as meant
"""

from __future__ import annotations


class PeftError(Exception):
    """Base of every error trimtab raises on purpose."""


class ArgumentError(PeftError, TypeError, ValueError):
    """An argument of another kind than the function takes; the message says what to give instead."""


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


class NotMergeable(ReadOnlyWeight, NotImplementedError):
    """An adapter that no weight of a layer can stand for."""


class RouteError(PeftError, RuntimeError):
    """A forward pass that cannot know which adapter its rows belong to."""


class BaseModelError(PeftError, OSError):
    """The base model could not be had. The message says why and what to do."""


class MissingPackageError(PeftError, ImportError):
    """A package that only some uses of trimtab need is not installed; the message says which extra brings it."""


class TrainError(PeftError, RuntimeError):
    """Training cannot start, or cannot go on."""


class DataError(PeftError, ValueError):
    """Rows that cannot be trained on; the message names each of them."""


class ExportError(PeftError, RuntimeError):
    """A model or adapter that cannot be written in the form asked for; nothing was."""


class OptimizerError(PeftError, ValueError):
    """An optimiser that cannot be made of this model, or of these settings."""


class PeftWarning(UserWarning):
    """Something works, but probably not as meant."""
