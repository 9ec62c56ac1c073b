"""PeftModel: the shell users hold. It adds files, task classes and generation to the tuner below it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.config import PeftConfig
from trimtab.core.io import push_to_hub, split_hub_arguments
from trimtab.core.report import warn
from trimtab.core.targets import inside
from trimtab.errors import ArgumentError, ConfigError
from trimtab.graft.graft import Graft, find_graft
from trimtab.layer.leaves import in_training
from trimtab.shell import saving
from trimtab.shell.arguments import SEVERAL, require_config, require_model, require_source
from trimtab.shell.generation import Generation
from trimtab.shell.loading import Source, keep, settle
from trimtab.shell.replacing import replaced
from trimtab.shell.tuner import tuner_class

# Heads that a task trains whole, whatever the config says.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


TASK_CLASSES: dict[str, type[PeftModel]] = {}  # filled by `tasks`, a file above


def task_class(config: Any, default: type[PeftModel]) -> type[PeftModel]:
    """The `PeftModelFor...` class of a config's task."""
    return TASK_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), default)


class PeftModel(Generation):
    """A base model with adapters.

    Args:
        model: the base model. It is adapted in place: its parameters are frozen, the layers the config names wrapped.
        peft_config: the config of the first adapter; a copy is kept.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: keep the adapters of half-precision layers in fp32.

    Attributes:
        base_model: the tuner, whose `.model` is the Hugging Face model; while the model has prompts only, that itself.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **adding: Any,
    ) -> None:
        super().__init__()
        require_model(model, f"{type(self).__name__}(model, config)")
        require_config(peft_config, f"{type(self).__name__}(model, config)")
        self.peft_type = peft_config.peft_type
        config = self._completed(model, peft_config, new="tensors" not in adding)
        self.__dict__["tuner"] = tuner_class(config.peft_type)(
            model, config, adapter_name, low_cpu_mem_usage, autocast=autocast_adapter_dtype, **adding
        )
        self._stand()
        self.prompt_encoder = self.graft.prompts
        if getattr(getattr(model, "config", None), "pretraining_tp", 1) != 1:
            model.config.pretraining_tp = 1  # type: ignore[union-attr]
        if _checkpoints(model):
            self.prepare_model_for_gradient_checkpointing(model)

    def _completed(self, model: nn.Module, given: PeftConfig, new: bool = False) -> Any:
        """A copy of the config, completed from the model and the task; where a `new` one names none, this class's."""
        config: Any = given.copy()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = name_of(model)
        own = next((task for task, cls in TASK_CLASSES.items() if cls is type(self)), None) if new else None
        heads = HEADS.get(str(getattr(config.task_type, "value", config.task_type or own)), ())
        if heads and "modules_to_save" in vars(config):  # trained tokens alone train no head
            saved = list(config.modules_to_save or ())
            config.modules_to_save = saved + [h for h in heads if h not in saved]
            config.__dict__["heads"] = heads  # whichever of them the model has
            if not any(inside(config.modules_to_save, path) for path, _ in model.named_modules()):
                warn(
                    f"The task {config.task_type or own} trains a head whole, and the model has none of that name "
                    f"({' or '.join(heads)}): only the adapter trains. Name the head in `modules_to_save`, or take a "
                    "class of the model that has one (AutoModelForSequenceClassification ...)."
                )
        return config

    # ------------------------------------------------------------------ adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter beside those that are there; it is neither active nor trainable until `set_adapter`.

        Raises:
            AdapterNameError: the name is taken, or cannot name a module and a folder.
        """
        if isinstance(adapter_name, PeftConfig):
            raise ArgumentError(
                "add_adapter(name, config) takes the name first, and then the config: they are swapped."
            )
        require_config(peft_config, "add_adapter(name, config)")
        config = self._completed(self.get_base_model(), peft_config, new=True)
        how = {"autocast": autocast_adapter_dtype, "trainable": False, "meta": low_cpu_mem_usage}
        self.tuner.add(adapter_name, config, **how)
        self._stand()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter from a folder or the Hub beside those that are there; `set_adapter` activates it.

        Args:
            strict: raise when the file does not fit the adapter key for key; False loads what fits.

        Returns:
            A tuple with `missing_keys` (in the model's own naming) and `unexpected_keys`.

        Raises:
            AdapterFileError: files that are missing, damaged, or do not fit; all faults in one message.
        """
        require_source(model_id, "load_adapter(folder, name)")
        hub, overrides = split_hub_arguments(kwargs)
        base, known = self.get_base_model(), adapter_name in self.peft_config
        source = Source(
            model_id,
            base,
            adapter_name,
            hub,
            overrides=overrides,
            device=torch_device,
            key_mapping=key_mapping,
            strict=strict,
            ignore_mismatched=ignore_mismatched_sizes,
            trainable=is_trainable,
        )
        if known:
            source.refill(self.graft)
        else:
            config: Any = source.config
            config.inference_mode = not is_trainable
            with source.blamed():
                config = self._completed(base, config)
                self.tuner.add(adapter_name, config, autocast=autocast_adapter_dtype, tensors=source, looked=True)
            self._stand()
            source.resume(self.graft)
        if not is_trainable and in_training(self):
            self.eval()
        return source.result

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use this adapter (or these, the first innermost) and train just it; with `inference_mode`, train none."""
        self.tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Forget an adapter; if it was active, the first remaining one becomes so."""
        self.tuner.delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> PeftModel:
        """Training or evaluation mode; says so where there would be nothing to train."""
        super().train(mode)
        if mode and self.peft_config and not any(p.requires_grad for p in self.parameters()):
            warn(
                "The model is in training mode, but nothing in it is trained: the adapters are frozen. Load with "
                "is_trainable=True to train an adapter further, or call set_adapter(name)."
            )
        return self

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen, whether they are active or not."""
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    # ------------------------------------------------------------------ files
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: "default" at the root of the folder, every other in a folder of its name, and a model card.

        No network is used, and no file is left half-written.

        Args:
            safe_serialization: safetensors; else a pickled `.bin`.
            selected_adapters: which (all by default).
            save_embedding_layers: whether the base's embeddings go along; "auto": when adapted or resized.
            path_initial_model_for_weight_conversion: the folder of the adapter as it started, for one whose start
                changed the base (PiSSA, OLoRA): what is saved is then a plain LoRA of twice the rank.
        """
        saving.save(
            self,
            Path(save_directory),
            safe_serialization,
            selected_adapters,
            save_embedding_layers,
            is_main_process,
            path_initial_model_for_weight_conversion,
            kwargs.get("state_dict"),
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the model card, or bring the data of the one that is there up to date."""
        saving.write_card(self, Path(output_dir))

    push_to_hub = push_to_hub

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: str | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A model with an adapter loaded from a folder or the Hub.

        Args:
            model: the base model, adapted in place. An adapter of this name that it has already is replaced.
            model_id: the adapter's folder or Hub id.
            is_trainable: train it further; else everything is frozen and in evaluation mode.
            config: used instead of the one in the folder; it becomes the adapter's own, completed.
            strict: raise when the file does not fit the adapter key for key; False loads what fits.

        Raises:
            AdapterFileError: files that are missing, damaged, or do not fit; all faults in one message.
        """
        if isinstance(model, PeftModel):
            raise ArgumentError(
                "PeftModel.from_pretrained(model, folder) takes a base model, and this is a PeftModel already: load "
                f"another adapter beside those it has with model.load_adapter('{model_id}', name)."
            )
        require_model(model, "PeftModel.from_pretrained(model, folder)")
        require_source(model_id, "PeftModel.from_pretrained(model, folder)")
        if config is not None and not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
        hub, overrides = split_hub_arguments(kwargs)
        source = Source(
            model_id,
            model,
            adapter_name,
            hub,
            config=None if config is None else config.copy(),
            overrides=overrides,
            device=torch_device,
            key_mapping=key_mapping,
            strict=strict,
            ignore_mismatched=ignore_mismatched_sizes,
            trainable=is_trainable,
        )
        own: Any = source.config
        own.inference_mode = not is_trainable
        settle(own, ephemeral_gpu_offload)
        graft = None if find_graft(model) is None else Graft.of(model)
        if graft is not None and graft.adapters:
            said = f" Adapter '{adapter_name}' is replaced." if adapter_name in graft.adapters else ""
            warn(SEVERAL + said, UserWarning)
        try:
            with source.blamed(), replaced(graft, adapter_name):
                adapted = task_class(own, cls)(model, own, adapter_name, autocast_adapter_dtype, tensors=source)
        except BaseException:
            discard_empty(model)
            raise
        source.resume(adapted.graft)
        if config is not None:
            keep(adapted.graft, adapted.graft.adapters[adapter_name], config)
        return adapted if is_trainable else adapted.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "tuner") or name.startswith("__"):
                raise
        return getattr(self._runs, name)


def discard_empty(model: nn.Module) -> None:
    """After a failed start: leave no trace on the model."""
    graft = find_graft(model)
    if graft is not None and not graft.adapters:
        graft.unload()


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def name_of(model: nn.Module) -> str | None:
    """Where a model came from, or None where it does not say."""
    own = vars(model)  # not what a model around another one passes on: that path has the inner model only
    name = own.get("name_or_path") or getattr(own.get("config"), "name_or_path", None)
    return name if isinstance(name, str) and name else None
