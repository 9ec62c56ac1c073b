"""What peft's loops ask of a small model beside a diffusion transformer: one class for each architecture.

Here a shadow does it by itself (`trimtab.init.beside.flux`); these are for programs that make their own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.init.beside.flux import DetachedFluxShadowModel, agree, facts_at, in_stem, is_flux


class DiffusionShadowBackend:
    """What differs from architecture to architecture."""

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` is of this architecture."""
        raise NotImplementedError

    @classmethod
    def build_mirror(cls, model: nn.Module, config: Any) -> Any:
        """A small model out of the base's blocks, of the sizes that a `ShadowConfig` names."""
        raise NotImplementedError

    @classmethod
    def load_pretrained(cls, model: nn.Module, model_id_or_path: str) -> Any:
        """One that is there already, in a folder or on the Hub."""
        raise NotImplementedError

    @classmethod
    def prepare_block_kwargs(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a block is called with beside its hidden states, by name."""
        return dict(kwargs)

    @classmethod
    def forward_backbone(cls, backbone: Any, inputs_embeds: Tensor, block_kwargs: dict[str, Any]) -> Any:
        """What the small model makes of hidden states (rows, tokens, dim): `last_hidden_state`."""
        return backbone(inputs_embeds=inputs_embeds)

    @classmethod
    def initialize_projection(cls, projection: nn.Linear, shadow_hidden: int) -> None:
        """Give the projection to the base's width its start."""

    @classmethod
    def freeze_embeddings(cls, backbone: Any) -> None:
        """Leave what reads the inputs as it is."""


class Flux2ShadowBackend(DiffusionShadowBackend):
    """Flux2 transformers of diffusers."""

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` is one."""
        return is_flux(model)

    @classmethod
    def build_mirror(cls, model: nn.Module, config: Any) -> DetachedFluxShadowModel:
        """Some of the base's blocks, cut to the sizes of a `ShadowConfig`."""
        layers = config.shadow_num_hidden_layers or 1
        return DetachedFluxShadowModel.from_base(
            model,
            num_layers=layers,
            num_single_layers=2 * layers,
            share_embeddings=config.share_embeddings,
            hidden_size=config.shadow_hidden_size,
            num_attention_heads=config.shadow_num_attention_heads,
            intermediate_size=config.shadow_intermediate_size,
        )

    @classmethod
    def load_pretrained(cls, model: nn.Module, model_id_or_path: str) -> DetachedFluxShadowModel:
        """A Flux2 transformer no larger than the base, whose inputs are the same."""
        kind: Any = type(model)
        facts_at(kind, model_id_or_path)  # says what is wrong with the path
        return validate_pretrained_flux_shadow(model, kind.from_pretrained(model_id_or_path))

    @classmethod
    def prepare_block_kwargs(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a single-stream block is called with beside its hidden states, by name."""
        names = ("encoder_hidden_states", "temb_mod", "image_rotary_emb", "joint_attention_kwargs")
        return {**kwargs, **dict(zip(names, args[1:], strict=False))}

    @classmethod
    def forward_backbone(cls, backbone: Any, inputs_embeds: Tensor, block_kwargs: dict[str, Any]) -> Any:
        """What its single-stream blocks make of hidden states (rows, tokens, dim): `last_hidden_state`."""
        return backbone(inputs_embeds=inputs_embeds, block_kwargs=block_kwargs)

    @classmethod
    def initialize_projection(cls, projection: nn.Linear, shadow_hidden: int) -> None:
        """The first of the base's dimensions are the small model's, the others nothing."""
        nn.init.zeros_(projection.weight)
        nn.init.eye_(projection.weight.data[:, :shadow_hidden])

    @classmethod
    def freeze_embeddings(cls, backbone: Any) -> None:
        """Leave what reads image, text and time as it is."""
        freeze_flux_stem_embeddings(backbone)


def get_diffusion_shadow_backend(model: nn.Module) -> type[DiffusionShadowBackend] | None:
    """The class for a model's architecture; None: its shadow sees each token by itself."""
    return Flux2ShadowBackend if Flux2ShadowBackend.supports(model) else None


def validate_pretrained_flux_shadow(base_model: Any, shadow_model: Any) -> DetachedFluxShadowModel:
    """A Flux2 transformer as the shadow of another.

    Raises:
        ConfigError: it reads other inputs, has heads of another kind, or more of anything.
    """
    agree(base_model.config, shadow_model.config)
    return DetachedFluxShadowModel(shadow_model)


def freeze_flux_stem_embeddings(backbone: DetachedFluxShadowModel) -> None:
    """Freeze what reads image, text and time; blocks and outputs stay as they are."""
    for name, parameter in backbone.named_parameters():
        if in_stem(name):
            parameter.requires_grad_(False)
