"""GLoRA (Chavan et al. 2023, https://arxiv.org/abs/2306.07967, eq. 7).   W' = W + W∘A + B;   b' = b + b∘D + E + W C.

Each of A ... E is a product of low rank, a vector, a number, or absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import Delta, wide
from trimtab.core.method import Call, Leaf, Leaves, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError

FORMS = {
    "config_A_B": ("constant", "lora", "none", "vector"),
    "config_C": ("lora", "none", "vector"),
    "config_D_E": ("constant", "none", "vector"),
}


@dataclass
class GloraConfig(LayerConfig):
    """The configuration of a GLoRA adapter."""

    r: int = help_field("The rank of what is a product of low rank.", 8)
    bias: str = help_field("Which biases of the base are trained too: none, all or glora_only.", "none")
    config_A_B: Literal["lora", "vector", "constant", "none"] = help_field("What A and B are.", "lora")
    config_C: Literal["lora", "vector", "none"] = help_field("What C is.", "lora")
    config_D_E: Literal["vector", "constant", "none"] = help_field("What D and E are.", "constant")
    init_weights: bool = help_field("Start from zeros; else random.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        for field, forms in FORMS.items():
            if (form := getattr(self, field)) not in forms:
                raise ConfigError(f"Invalid {field} value: {form!r}. Valid values are: {', '.join(forms)}.")
        super().__post_init__()
        self.peft_type = PeftType.GLORA


class Glora(Delta):
    """The weight and the bias scaled and shifted, and the bias moved by what the weight makes of a vector."""

    when = "scales, shifts and biases of weights at once"
    reads = True
    config, prefix, targets = GloraConfig, "glora_", ATTENTION
    kinds = fused = frozenset({"linear"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        out, into, r = site.fan_out, site.fan_in, config.r
        leaves = {}
        for letter, form in forms_at(site, config).items():
            name = f"glora_{letter}"
            rows, columns = {"A": (out, into), "B": (out, into), "C": (into, 1)}.get(letter, (out, 0))
            if form == "lora":
                require_rank(r)
                leaves[f"{name}.Xd"] = Leaf((rows, r))  # (out, r) or (in, r)
                leaves[f"{name}.Xu"] = Leaf((r, columns))  # (r, in) or (r, 1)
            elif form == "vector":
                leaves[f"{name}.X"] = Leaf((rows, 1) if columns else (rows,))  # (out, 1), (in, 1) or (out,)
            elif form == "constant":
                leaves[f"{name}.X"] = Leaf((1,))  # (1,)
            else:
                leaves[f"{name}.zeros"] = Leaf((1,), train=False, buffer=True)  # (1,): of PEFT's shape in the file
        return leaves

    @property
    def weighs(self) -> list[str]:
        """The leaves that change the weight."""
        return [leaf for leaf in self.declared if leaf[6] in "AB" and "zeros" not in leaf]

    def reset(self, config: Any) -> None:
        for leaf in sorted(self.declared, key=lambda name: (name[6], name.endswith("Xd"))):  # PEFT's order of draws
            tensor = self.tensor(leaf)
            if "zeros" in leaf or (config.init_weights and "Xu" not in leaf):
                tensor.zero_()
            else:
                draw(tensor)

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        if "zeros" not in name:
            return tensor
        out, into = self.site.fan_out, self.site.fan_in
        return tensor.new_zeros({"A": (out, into), "B": (out, into), "C": (into, 1)}.get(name[6], (out,)))

    def unpack(self, name: str, value: Tensor) -> Tensor:
        return value.flatten()[:1] if "zeros" in name else value

    def value(self, letter: str, tensors: dict[str, Tensor] | None = None) -> Tensor | None:
        """One of A ... E, in a shape that broadcasts; None where it is absent."""
        parts = {leaf: self.tensor(leaf) for leaf in self.declared} if tensors is None else tensors
        if (Xd := parts.get(f"glora_{letter}.Xd")) is not None:
            return wide(Xd) @ wide(parts[f"glora_{letter}.Xu"])
        X = parts.get(f"glora_{letter}.X")
        return None if X is None else wide(X)

    def form(self, *tensors: Tensor) -> Tensor:
        """dW (out, in), in fp32 at least; it follows from the base's own W, whatever stands between."""
        parts = dict(zip(self.weighs, tensors, strict=True))
        A, B, W = self.value("A", parts), self.value("B", parts), self.site.matrix()
        dW = wide(W).new_zeros(W.shape) if A is None else wide(W) * A
        return dW if B is None else dW + B

    def moved(self) -> Tensor | None:
        """db (out,); None where the layer has no bias."""
        b = self.site.bias()
        if b is None:
            return None
        db = wide(b).new_zeros(b.shape)
        if (D := self.value("D")) is not None:
            db = db + b * D
        if (E := self.value("E")) is not None:
            db = db + E
        if (C := self.value("C")) is not None:
            db = db + wide(self.site.matrix()) @ C[:, 0]
        return db

    @property
    def sources(self) -> list[Tensor]:  # type: ignore[override]
        """What the change is formed from."""
        return [self.tensor(leaf) for leaf in self.weighs]

    weight = Delta.summed

    def through(self, x: Tensor, call: Call) -> Tensor | None:
        y = self.joined(x, call) if self.weighs else None
        return None if y is None else self.shifted(y)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or (db := self.moved()) is None else b + db

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.shifted(self.added(y, x, call) if self.weighs else y)

    def shifted(self, y: Tensor) -> Tensor:
        """An output with db added."""
        return y if (db := self.moved()) is None else y + db.to(y.dtype)


def draw(tensor: Tensor) -> None:
    """Give a number, a vector or a factor its random start."""
    if tensor.numel() == 1:
        tensor.normal_(std=0.02)
    elif tensor.ndim == 1:
        tensor.uniform_(-(len(tensor) ** -0.5), len(tensor) ** -0.5)
    else:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def forms_at(site: Site, config: Any) -> dict[str, str]:
    """What A ... E are at a site: without a bias there is nothing for C, D and E to move."""
    biased = site.bias() is not None
    forms = dict.fromkeys("AB", config.config_A_B)
    forms["C"] = config.config_C if biased else "none"
    return forms | dict.fromkeys("DE", config.config_D_E if biased else "none")
