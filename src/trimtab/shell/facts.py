"""What one can ask an adapted model: its adapters, which are in use, what trains, its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.errors import AdapterNameError
from trimtab.graft.graft import Graft
from trimtab.shell.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from trimtab.shell.tuner import Tuner


class Facts(nn.Module):
    """The questions of `PeftModel`; nothing here changes the model.

    Attributes:
        base_model: the tuner, whose `.model` is the Hugging Face model; while the model has prompts only, that itself.
        tuner: the tuner; it stands in the module tree as `base_model`, or not at all.
    """

    base_model: nn.Module
    tuner: Tuner

    def _stand(self) -> None:
        """Put the model or the tuner into the tree, whichever PEFT has there."""
        only_prompts = all(config.is_prompt_learning for config in self.peft_config.values())
        self.base_model = self.tuner.model if only_prompts else self.tuner

    @property
    def _runs(self) -> nn.Module:
        """What a forward pass calls: what stands in the tree may be wrapped by now."""
        return self.tuner if self.base_model is self.tuner.model else self.base_model

    @property
    def graft(self) -> Graft:
        """The model's adapters."""
        return self.tuner.graft

    @property
    def peft_config(self) -> dict[str, Any]:
        """{adapter: its config}."""
        return self.tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use, innermost first."""
        return self.tuner.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter in use, or the list of them where there are several."""
        return self.tuner.active_adapter

    @property
    def active_peft_config(self) -> Any:
        """The config of the (first) active adapter.

        Raises:
            AdapterNameError: no adapter is active.
        """
        if not self.active_adapters:
            known = f"set_adapter() one of {list(self.peft_config)}" if self.peft_config else "the model has none"
            raise AdapterNameError(f"No adapter is active, so that there is no active config: {known}.")
        return self.peft_config[self.active_adapters[0]]

    @property
    def _is_prompt_learning(self) -> bool:
        """Whether the active adapter is a prompt; under the name that programs ask PEFT's models by."""
        return bool(self.active_peft_config.is_prompt_learning)

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The model's own `prepare_inputs_for_generation`."""
        return self.tuner.model.prepare_inputs_for_generation

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of modules that adapters train whole."""
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The number format of the base model."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Arguments of a forward pass that are for the adapters and not for the base model."""
        return {"adapter_names", "alora_offsets"}

    @property
    def prompt_tokens(self) -> dict[str, torch.Tensor]:
        """{adapter: the numbers of its virtual tokens}, of adapters that are prompts."""
        prompts = {name: c for name, c in self.peft_config.items() if c.is_prompt_learning}
        return {
            name: torch.arange(c.num_virtual_tokens * (c.num_transformer_submodules or 1))
            for name, c in prompts.items()
        }

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's input embedding."""
        embedding: nn.Module = self.get_base_model().get_input_embeddings()  # type: ignore[operator]
        return embedding

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for all that an adapter changes."""
        return self.tuner.supports_lora_conversion(adapter_name)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward pass uses any adapter."""
        route = self.graft.board.route_here(quiet=True)
        return route.enabled and bool(route.active)

    def get_base_model(self) -> nn.Module:
        """The Hugging Face model inside, with the adapters in place."""
        return self.tuner.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """One row for each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the whole model."""
        return get_model_status(self)
