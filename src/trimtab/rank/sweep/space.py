"""What a sweep tries: settings (rank, alpha, layers, rows), and for each of them learning rates and seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab.errors import ConfigError

RANKS = (1, 2, 4, 8, 16, 32, 64)
ALPHA = 32  # fixed, as the scale alpha / r makes the best learning rate nearly independent of r
FACTORS = (1 / 3, 1.0, 3.0)  # learning rates around the usual one


@dataclass(frozen=True)
class Setting:
    """One point of the curve."""

    rank: int
    alpha: float
    targets: str  # all-linear, names with commas between them, or a pattern, as `target_modules` has it
    rows: int  # to learn from

    @property
    def name(self) -> str:
        """It as a folder's name."""
        return f"r{self.rank}-a{_number(self.alpha)}-{_plain(self.targets)}-n{self.rows}"


@dataclass(frozen=True)
class Trial:
    """One run of a setting."""

    setting: Setting
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """It as the name of an adapter and of a folder."""
        mantissa, exponent = f"{self.rate:.5e}".split("e")
        return f"{self.setting.name}-lr{_number(float(mantissa))}e{int(exponent)}-s{self.seed}"


@dataclass(frozen=True)
class Space:
    """What is tried.

    Attributes:
        rates: none: around the rate that suits the model's width.
        seeds: runs of each setting that are trained to the end, at its best rate.
        data_sizes: rows to learn from; none: all there are.
    """

    ranks: tuple[int, ...] = RANKS
    rates: tuple[float, ...] = ()
    alphas: tuple[float, ...] = (ALPHA,)
    targets: tuple[str, ...] = ("all-linear",)
    seeds: int = 2
    data_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ranks", "rates", "alphas", "targets", "data_sizes"):  # in order, each once; layers as given
            values = tuple(int(v) if isinstance(v, float) and v.is_integer() else v for v in getattr(self, name))
            found = tuple(dict.fromkeys(values)) if name == "targets" else tuple(sorted(set(values)))
            object.__setattr__(self, name, found)
        faults = [
            f"{name}: {value} is not {what}"
            for name, what in (("ranks", "a rank"), ("data_sizes", "a number of rows"))
            for value in getattr(self, name)
            if not (isinstance(value, int) and value > 0)
        ]
        for name, what in (("rates", "a learning rate"), ("alphas", "an alpha")):
            faults += [f"{name}: {v} is not {what}" for v in getattr(self, name) if not 0 < v < float("inf")]
        faults += [f"{name}: there is none" for name in ("ranks", "alphas", "targets") if not getattr(self, name)]
        if self.seeds < 1:
            faults.append(f"seeds: {self.seeds} is not a number of runs")
        if faults:
            raise ConfigError(f"What is to be tried cannot be: {'; '.join(faults)}.")

    def settings(self, rows: int) -> list[Setting]:
        """Every setting, with so many rows at hand.

        Raises:
            ConfigError: more rows are asked for than there are.
        """
        if self.data_sizes and self.data_sizes[-1] > rows:
            raise ConfigError(f"data_sizes asks for {self.data_sizes[-1]} rows to learn from, and there are {rows}.")
        sizes: Sequence[int] = self.data_sizes or (rows,)
        return [Setting(r, a, t, n) for n in sizes for t in self.targets for a in self.alphas for r in self.ranks]

    def search(self, setting: Setting, first: int) -> list[Trial]:
        """The runs that find a setting's learning rate, all of one seed."""
        return [Trial(setting, rate, first) for rate in self.rates]

    def repeats(self, setting: Setting, rate: float, first: int) -> list[Trial]:
        """The runs of the other seeds, at the rate that was found."""
        return [Trial(setting, rate, first + i) for i in range(1, self.seeds)]


def around(rate: float) -> tuple[float, ...]:
    """Learning rates a factor of 3 below and above one."""
    return tuple(float(f"{rate * factor:.1e}") for factor in FACTORS)


def chunks(settings: Sequence[Setting], per: int, at_once: int) -> Iterable[list[Setting]]:
    """The settings in parts of which no more than `at_once` runs are trained together (0: all).

    Args:
        per: runs of a setting; they stay together.
    """
    count = max(1, at_once // max(1, per) if at_once else len(settings))
    return (list(settings[i : i + count]) for i in range(0, len(settings), count))


def _number(value: float) -> str:
    """A number without a point."""
    return f"{value:g}".replace(".", "_")


def _plain(text: str) -> str:
    """A text as a part of a name; what is left out of it is told by a digest."""
    plain = re.sub(r"[^\w-]+", "+", text).strip("+")[:40]
    mark = "" if plain == text.replace(",", "+") else "-" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return plain + mark
