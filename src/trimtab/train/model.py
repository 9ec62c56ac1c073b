"""The model of a run: the base as it was asked for, in the precision of the run, and the adapter on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.config import CONFIG_NAME
from trimtab.errors import AdapterFileError, BaseModelError, ConfigError
from trimtab.files.sources import packaged_name, resolve_base
from trimtab.shell.convert import prepare_model_for_kbit_training
from trimtab.shell.peft_model import PeftModel
from trimtab.shell.tasks import get_peft_model
from trimtab.train.adapters import adapter_config
from trimtab.train.checkpoint import write_folder
from trimtab.train.config import TrainConfig
from trimtab.train.folder import BASE
from trimtab.train.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from trimtab.train.precision import Precision, choose
from trimtab.train.provenance import check_provenance

__all__ = ["Base", "adapt", "load_base", "make_optimizer"]


@dataclass
class Base:
    """A base model, ready to be adapted."""

    model: Any
    tokenizer: Any
    name: str  # what a saved adapter calls it
    precision: Precision
    notices: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str | None:
        """What was loaded, where it is from the Hub."""
        found: str | None = getattr(self.model.config, "_commit_hash", None)
        return found

    @property
    def pad_id(self) -> int:
        """What rows are padded with; it is masked, so any token does."""
        found: int | None = self.tokenizer.pad_token_id
        return found if found is not None else self.tokenizer.eos_token_id or 0


def load_base(config: TrainConfig, model: str | None = None, cls: Any = None, **more: Any) -> Base:
    """The base model of a run and its tokenizer.

    Args:
        model: instead of `config.model`.
        cls: the transformers class to load it by; by default that of causal language models.
        more: for its `from_pretrained`.

    Raises:
        BaseModelError: it cannot be had: no such model, a folder without weights, no tokenizer.
    """
    name = packaged_name(model or config.model)
    device = torch.device(config.device or default_device())
    precision = choose(config.precision, device)
    place = resolve_base(name)
    folder = Path(place).expanduser()
    if folder.is_dir() and (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{name} is an adapter, not a model. To go on training it: continue_from: {name}; to train a new one on "
            f"what it made of its base: on_top_of: {name}."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = (cls or AutoModelForCausalLM).from_pretrained(
            place, revision=config.revision, dtype=precision.dtype, **more
        )
        tokenizer = AutoTokenizer.from_pretrained(place, revision=config.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as e:  # what from_pretrained raises for what it cannot read
        raise BaseModelError(f"The model {name} cannot be loaded: {e}") from e
    if getattr(loaded, "is_quantized", False):
        prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=config.gradient_checkpointing)
    else:
        loaded.to(device)
    return Base(loaded, tokenizer, name, precision)


def default_device() -> str:
    """The best device there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def adapt(base: Base, config: TrainConfig, steps: int, model: PeftModel | None = None, adapter: str = "") -> PeftModel:
    """The base with the run's adapter on it: a new one, or one that is trained further.

    Args:
        model: the base with other adapters already.
        adapter: what the new one is called beside them; it is then the active one, and the only one that is trained.

    Raises:
        ConfigError: fields of an adapter that has its own, or that the method refuses.
        AdapterFileError: an adapter that does not fit the base.
    """
    torch.manual_seed(config.seed)
    if config.gradient_checkpointing and not getattr(base.model, "is_quantized", False):
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.continue_from:
        if config.adapter:
            raise ConfigError(
                f"{', '.join(config.adapter)} cannot be given together with continue_from: the adapter of "
                f"{config.continue_from} has its own."
            )
        model = _on(base, config.continue_from, True, model, adapter)
    else:
        try:
            own = adapter_config(config, steps)
            if model is None:
                model = get_peft_model(base.model, own, adapter_name=adapter or "default")
            else:
                model.add_adapter(adapter, own)
        except NotImplementedError as e:  # a field that does not act yet
            raise ConfigError(str(e)) from e
    model.set_adapter(adapter or "default")
    model.active_peft_config.base_model_name_or_path = base.name
    model.active_peft_config.revision = config.revision
    return model


def merge_first(base: Base, config: TrainConfig, folder: Path | None) -> Base:
    """The base with the adapter `on_top_of` merged into it, saved in `folder`: that is what the new adapter fits.

    Raises:
        AdapterFileError: the adapter does not fit the base.
    """
    assert config.on_top_of is not None
    merged: Any = _on(base, config.on_top_of).merge_and_unload()

    def write(path: Path) -> None:
        merged.save_pretrained(path)
        base.tokenizer.save_pretrained(path)

    if folder is not None:
        write_folder(folder, write)
    name = str(config.folder / BASE)
    return Base(merged, base.tokenizer, name, base.precision, base.notices)


def _on(
    base: Base, adapter: str, is_trainable: bool = False, model: PeftModel | None = None, name: str = ""
) -> PeftModel:
    """The base with an adapter that was trained before; says so where that was on another base."""
    known = check_provenance(adapter, base.model, base.name, base.tokenizer)
    try:
        if model is None:
            model = PeftModel.from_pretrained(base.model, adapter, name or "default", is_trainable)
        else:
            model.load_adapter(adapter, name, is_trainable=is_trainable)
    except AdapterFileError as e:
        raise AdapterFileError(" ".join([*known, str(e)])) from e
    base.notices += known
    assert model is not None
    return model


def rate_by_width(model: Any) -> float:
    """A learning rate for a model of this width: 5e-4 (2000 / width)^0.78, at most 1e-3.

    The fit is Tinker's for LoRA on Llama models (https://github.com/thinking-machines-lab/tinker-cookbook); narrower
    models take more. A fixed rate that suits 4096 is too small for 576: 16 of 100 test rows right instead of 46.
    """
    width = model.get_input_embeddings().weight.shape[-1]
    return float(f"{min(1e-3, 5e-4 * (2000 / width) ** 0.78):.1e}")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The run's optimiser over the model's trainable parameters.

    Raises:
        OptimizerError: one that does not fit the model's adapter.
    """
    optimizer = _optimizer(model, config)
    for group in optimizer.param_groups:  # what the schedule starts from; a state that is loaded must find its key
        group["initial_lr"] = group["lr"]
    return optimizer


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    assert config.learning_rate is not None  # the run has put one in
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "loraplus":
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=config.loraplus_lr_ratio, loraplus_weight_decay=decay
        )
    if config.optimizer == "lorafa":
        own: Any = getattr(model, "active_peft_config", None)
        r, alpha = getattr(own, "r", 0), getattr(own, "lora_alpha", 0)
        return create_lorafa_optimizer(model, r, alpha, lr=rate, weight_decay=decay)
    if config.optimizer == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate, weight_decay=decay)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
