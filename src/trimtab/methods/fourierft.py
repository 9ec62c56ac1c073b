"""FourierFT (Gao et al. 2024, https://arxiv.org/abs/2405.03003, eq. 2-4).   W' = W + s Re(ifft2(F)).

F (out, in) is zero but for n trained entries, whose places are drawn from a seed that the config names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import Delta, drawn_places, require_places, wide
from trimtab.core.method import Leaf, Leaves
from trimtab.core.site import Site


@dataclass
class FourierFTConfig(LayerConfig):
    """The configuration of a FourierFT adapter."""

    n_frequency: int = help_field("How many entries of the spectrum are trained, a layer.", 1000)
    scaling: float = help_field("The scale of the update.", 150.0)
    random_loc_seed: int | None = help_field("The seed that the entries' places are drawn from.", 777)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or fourier_only.", "none")
    n_frequency_pattern: dict[str, int] = help_field(
        "Module name or regular expression -> its own number of entries.", factory=dict
    )
    init_weights: bool = help_field("Start from F = 0; else from a random F.", False)

    patterns = ("n_frequency_pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT

    def resolve(self, name: str) -> FourierFTConfig:
        """This config with the number of entries that the pattern gives the module `name`."""
        own, pattern = self.shallow(), match_pattern(self.n_frequency_pattern, name)
        own.n_frequency = self.n_frequency if pattern is None else self.n_frequency_pattern[pattern]
        return own


class FourierFT(Delta):
    """A delta of full size with a sparse spectrum."""

    when = "very small files"
    config, prefix = FourierFTConfig, "fourierft_"
    kinds = fused = frozenset({"linear"})
    targets = {**ATTENTION, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        n = config.n_frequency
        require_places(site, n, "n_frequency")
        return {
            "fourierft_spectrum": Leaf((n,)),  # (n_frequency,)
            "fourierft_places": Leaf((n,), train=False, file=False, buffer=True, dtype=torch.int64),  # (n_frequency,)
        }

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.scaling

    def reset(self, config: Any) -> None:
        places = drawn_places(self.site, config.n_frequency, config.random_loc_seed)
        self.fourierft_places.copy_(places)
        if config.init_weights:
            self.fourierft_spectrum.zero_()
        else:
            self.fourierft_spectrum.normal_()

    def form(self, spectrum: Tensor) -> Tensor:
        """dW (out, in), in fp32 at least."""
        out, into = self.site.fan_out, self.site.fan_in
        i, j = self.fourierft_places // into, self.fourierft_places % into
        # The real part is that of a spectrum with F's symmetric part alone, of which the columns to the middle say all.
        half, s = into // 2 + 1, wide(spectrum) * (self.scaling / 2)
        columns = torch.cat([j, (into - j) % into])
        kept = torch.where(columns < half, torch.cat([s, s]), 0)
        rows, columns = torch.cat([i, (out - i) % out]), columns.clamp(max=half - 1)
        F = s.new_zeros(out * half).index_put_((rows * half + columns,), kept, accumulate=True)
        return torch.fft.irfft2(F.view(out, half).to(torch.promote_types(F.dtype, torch.complex64)), (out, into))

    weight, through, after = Delta.summed, Delta.joined, Delta.added
    sources = property(lambda self: (self.fourierft_spectrum,))
