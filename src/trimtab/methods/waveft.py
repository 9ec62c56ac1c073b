"""WaveFT (Bilican et al. 2025, https://arxiv.org/abs/2505.12532, section 3).   W' = W + s idwt2(F).

F is zero but for n trained entries, whose places are drawn from a seed that the config names. Its four quarters are the
coefficients of a wavelet: of the averages, of the details of columns, of rows, and of both. waveft.json holds the
filters by which the wavelets' averages are spread out, of the families of Daubechies (db, sym) and coiflets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import Sparse, drawn_places, require_places, wide
from trimtab.core.method import Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError

FAMILIES = [f"{name}{i}" for name, orders in (("db", range(1, 11)), ("sym", range(2, 11)), ("coif", range(1, 6)))
            for i in orders]  # fmt: skip


@dataclass
class WaveFTConfig(LayerConfig):
    """The configuration of a WaveFT adapter."""

    n_frequency: int = help_field("How many coefficients are trained, a layer.", 2592)
    scaling: float = help_field("The scale of the update.", 25.0)
    wavelet_family: str = help_field("The wavelet: db1 (Haar's) to db10, sym2 to sym10, coif1 to coif5.", "db1")
    use_idwt: bool = help_field("False: the coefficients are entries of the update themselves.", True)
    random_loc_seed: int | None = help_field("The seed that the coefficients' places are drawn from.", 777)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or waveft_only.", "none")
    n_frequency_pattern: dict[str, int] = help_field(
        "Module name or regular expression -> its own number of coefficients.", factory=dict
    )
    proportional_parameters: bool = help_field("Share out as many coefficients by the layers' sizes.", False)
    init_weights: bool = help_field("Start from F = 0; else from a small random F.", True)

    patterns = ("n_frequency_pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.WAVEFT
        if self.wavelet_family not in FAMILIES:
            raise ConfigError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: {FAMILIES}"
            )

    def resolve(self, name: str) -> WaveFTConfig:
        """This config with the number of coefficients that the pattern gives the module `name`."""
        own, pattern = self.shallow(), match_pattern(self.n_frequency_pattern, name)
        own.n_frequency = self.n_frequency if pattern is None else self.n_frequency_pattern[pattern]
        return own


class WaveFT(Sparse):
    """A delta of full size that is sparse in wavelets."""

    when = "the number of parameters is to be set exactly"
    config, prefix = WaveFTConfig, "waveft_"
    kinds = fused = frozenset({"linear"})
    targets = {k: v for k, v in ATTENTION.items() if k not in ("btlm", "rwkv", "rwkv7")} | {
        "gpt2": ["mlp.c_proj"],
        "gpt_bigcode": ["mlp.c_proj"],
    }

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        if not config.proportional_parameters:
            return {}
        n, size = config.n_frequency * len(sites), sum(s.fan_in * s.fan_out for s in sites)
        shape = (n, size, 0)  # no numbers: the shape tells every layer what is shared out
        return {"waveft_sum": Leaf(shape, train=False, file=False, buffer=True)}  # (n, size, 0)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        n, size = config.n_frequency, site.fan_in * site.fan_out
        require_places(site, n, "n_frequency")
        if shared:
            coefficients, sizes, _ = shared["waveft_sum"].shape
            n = max(1, round(coefficients * size / sizes))
        leaves = {
            "waveft_spectrum": Leaf((n,)),  # (n,)
            "waveft_places": Leaf((n,), train=False, file=False, buffer=True, dtype=torch.int64),  # (n,)
        }
        if config.use_idwt:
            length = length_of(config.wavelet_family)
            leaves["waveft_filters"] = Leaf((2, length), train=False, file=False, buffer=True)  # (2, length)
        return leaves

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.scaling

    def reset(self, config: Any) -> None:
        self.waveft_places.copy_(drawn_places(self.site, len(self.waveft_places), config.random_loc_seed))
        if config.init_weights:
            self.waveft_spectrum.zero_()
        else:
            self.waveft_spectrum.normal_().mul_(0.01)
        if config.use_idwt:
            self.waveft_filters.copy_(filters_of(config.wavelet_family))

    def entries(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Where dW is not zero, some places several times, and what comes there."""
        s, places = self.scaling * wide(spectrum), self.waveft_places
        out, into = self.site.fan_out, self.site.fan_in
        if not self.options.use_idwt:
            return places, s
        filters = wide(self.waveft_filters)
        edge = filters.shape[1] // 2 - 1  # F stands in the middle of a matrix that is larger by the filter's length
        rows, columns = ((size + 1) // 2 + edge for size in (out, into))  # of a quarter
        i, j = places // into + edge, places % into + edge
        at, a = spread(i % rows, filters[j // columns], out)  # details of columns go by their rows
        to, b = spread(j % columns, filters[i // rows], into)
        spots, values = at[:, :, None] * into + to[:, None], s[:, None, None] * a[:, :, None] * b[:, None]
        return spots.flatten(), values.flatten()

    weight, through, after = Sparse.summed, Sparse.joined, Sparse.added
    sources = property(lambda self: (self.waveft_spectrum,))


def length_of(family: str) -> int:
    """How many numbers a wavelet's filters have."""
    return 2 * int(family.strip("dbsymcoif")) * (3 if "coif" in family else 1)


def filters_of(family: str) -> Tensor:
    """The filters by which a wavelet's averages and details are spread out (2, length), in fp64."""
    known = json.loads((Path(__file__).parent / "waveft.json").read_text())
    low = torch.tensor(known[family], dtype=torch.float64)
    return torch.stack([low, low.flip(0) * (-1.0) ** torch.arange(len(low))])


def spread(i: Tensor, filters: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where in a row of `size` numbers coefficients i (n,) go by their filters, and how much of each: (n, length)."""
    length = filters.shape[1]
    at = 2 * i[:, None] + torch.arange(2 - length, 2, device=i.device)
    return at.clamp(0, size - 1), filters * ((at >= 0) & (at < size))
