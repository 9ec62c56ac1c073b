"""Tiny transformers of diffusers, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES: dict[str, Any] = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2}
FLUX2: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 12,
    "timestep_guidance_channels": 16, "mlp_ratio": 2.0, "axes_dims_rope": (2, 2, 2, 2), **SIZES,
}  # fmt: skip
FLUX1: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 12,
    "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4), **SIZES,
}  # fmt: skip
SD3: dict[str, Any] = {
    **PATCHES, **SIZES, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "out_channels": 4,
}  # fmt: skip
AURA: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
    "joint_attention_dim": 12, "caption_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 16, **SIZES,
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
PIXART: dict[str, Any] = {
    **PATCHES, **SIZES, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12, "norm_num_groups": 1,
}  # fmt: skip
SANA: dict[str, Any] = {
    **PATCHES, **SIZES, "patch_size": 1, "out_channels": 4, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
}  # fmt: skip


class Block(nn.Module):
    """A feed-forward part, whose input has a name of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Plain(nn.Module):
    """A stack of blocks of nobody's making."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = self.into(hidden_states)
        for block in self.blocks:
            x = block(x)
        return (self.out(x),)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "flux2": lambda **more: Flux2Transformer2DModel(**{**FLUX2, **more}),
    "flux1": lambda: FluxTransformer2DModel(**FLUX1),
    "sd3": lambda: SD3Transformer2DModel(**SD3),
    "aura": lambda: AuraFlowTransformer2DModel(**AURA),
    "pixart": lambda: PixArtTransformer2DModel(**PIXART),
    "sana": lambda: SanaTransformer2DModel(**SANA),
    "unet": lambda: UNet2DConditionModel(**UNET),
    "plain": Plain,
}


def build(name: str, **more: Any) -> Any:
    """The model of that name, with the same numbers each time."""
    torch.manual_seed(0)
    model = MODELS[name](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0, and then nothing below them can be seen
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(name: str) -> dict[str, Any]:
    """Two rows for it."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    image, text = draw(2, 6, 4), {"encoder_hidden_states": draw(2, 5, 12)}
    if name == "plain":
        return {"hidden_states": image}
    if name in ("flux1", "flux2"):
        axes = 4 if name == "flux2" else 3
        times = {"timestep": torch.tensor([0.3, 0.6])} | ({"guidance": torch.tensor([4.0, 3.0])} if axes == 4 else {})
        places = {"img_ids": torch.arange(6 * axes).view(6, axes) % 5, "txt_ids": torch.arange(5 * axes).view(5, axes)}
        pooled = {} if name == "flux2" else {"pooled_projections": draw(2, 10)}
        return {"hidden_states": image, **text, **times, **places, **pooled}
    latents, times = draw(2, 4, 8, 8), {"timestep": torch.tensor([1, 7])}
    if name == "unet":
        return {"sample": latents, **text, **times}
    more = {
        "sd3": {"pooled_projections": draw(2, 10)},
        "pixart": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "aura": {"timestep": torch.tensor([0.1, 0.7])},
    }
    return {"hidden_states": latents, **text, **times, **more.get(name, {})}


def out(model: Any, name: str, **more: Any) -> Tensor:
    """What it says of the batch."""
    said: Tensor = model(**batch(name), **({} if name == "plain" else {"return_dict": False}), **more)[0]
    return said
