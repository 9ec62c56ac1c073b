"""A model as a command names it: a base by folder, Hub id, GGUF file or packaged name, or an adapter with its base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab.core.config import PeftConfig
from trimtab.errors import AdapterFileError, AdapterNameError, BaseModelError, ConfigError
from trimtab.files.finding import adapter_folder, adapters_below, is_adapter
from trimtab.files.sources import resolve_base
from trimtab.shell.auto import AutoPeftModel
from trimtab.shell.peft_model import PeftModel

BASE = "base"  # what the model without any adapter is called
NULL = "null"  # what a random adapter is called that another one is compared to


@dataclass
class Opened:
    """A model that is ready to be used, in evaluation mode."""

    model: Any  # a PeftModel where there are adapters, else the Hugging Face model
    tokenizer: Any  # None where neither base nor adapter has one
    base: str  # as it was named
    adapters: dict[str, str] = field(default_factory=dict)  # name -> folder or Hub id

    @property
    def where(self) -> str:
        """Number format and device, for people."""
        weight = next(self.model.parameters())
        return f"{str(weight.dtype).removeprefix('torch.')}, {weight.device.type}"

    def need_tokenizer(self) -> Any:
        """The tokenizer, or an error that says what is missing."""
        if self.tokenizer is None:
            raise BaseModelError(f"{self.base} has no tokenizer beside its weights, and no adapter brings one.")
        return self.tokenizer


def open_model(
    model: str | os.PathLike[str] | None = None,
    adapters: Sequence[str] | Mapping[str, str] = (),
    dtype: str | None = None,
    device: str | None = None,
    task: str | None = None,
) -> Opened:
    """Load a base model and any adapters on it.

    Args:
        model: a base (folder, Hub id, GGUF file, packaged name), or an adapter, whose base is loaded too. None: the
            base that the first adapter names.
        adapters: folders or Hub ids, each also as "name=path"; the first becomes the active one.
        dtype: "float32", "bfloat16" ..., or "auto", as stored. None: float32 on the CPU, where half precision is slow
            on most machines, and as stored elsewhere.
        device: None: "cuda" where there is one, else "cpu".
        task: the one that an adapter must be for, if it says which.

    Raises:
        BaseModelError: the base cannot be had.
        AdapterFileError: an adapter that is none, is damaged, or does not fit the base.
        ConfigError: an adapter for another task.
    """
    wanted = dict(adapters) if isinstance(adapters, Mapping) else named(adapters)
    if model is not None and is_adapter(model):
        first = named([os.fspath(model)])
        if set(first) & set(wanted):
            raise AdapterNameError(f"There are two adapters named '{next(iter(first))}': give name=path.")
        wanted, model = {**first, **wanted}, None
    folders = {name: adapter_folder(path) for name, path in wanted.items()}
    first_folder = next(iter(folders.values()), None)
    config = PeftConfig.from_pretrained(first_folder) if first_folder is not None else None
    if task is not None and _task(config) not in (None, task):
        raise ConfigError(f"The adapter {first_folder} is for {_task(config)}, and this needs one for {task}.")
    base = _base_of(first_folder, config) if model is None else os.fspath(model)
    revision = config.revision if config is not None and model is None else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    loaded = _load_base(base, revision, config, dtype, device)
    tokenizer = _tokenizer(next((f for f in folders.values() if _has_tokenizer(f)), None) or resolve_base(base))
    if config is not None:
        AutoPeftModel._fit_vocabulary(loaded, first_folder or "", {})
    for name, folder in folders.items():
        if isinstance(loaded, PeftModel):
            loaded.load_adapter(folder, name)
        else:
            loaded = PeftModel.from_pretrained(loaded, folder, adapter_name=name)
    return Opened(loaded.eval(), tokenizer, base, folders)


def named(adapters: Sequence[str]) -> dict[str, str]:
    """{name: path} of "path" and "name=path"; "runs/a/adapter" is named "a", any other path after its folder.

    Raises:
        AdapterNameError: two adapters of one name, or one that is reserved.
    """
    found: dict[str, str] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals or "/" in name or Path(given).exists():
            path, name = given, _name_of(given)
        if name in found or name in (BASE, NULL):
            why = "there are two of that name" if name in found else "that is reserved"
            raise AdapterNameError(f"An adapter cannot be named '{name}' ({why}): give another one, name={path}")
        found[name] = path
    return found


def _name_of(path: str) -> str:
    whole = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  a link keeps its own name
    name = (whole.parent if whole.name == "adapter" else whole).name.replace(".", "_") or "adapter"
    return f"{name}_adapter" if name in (BASE, NULL) else name


@contextmanager
def using(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside the block the model answers with this adapter, or, where None or "base", without any."""
    if not isinstance(model, PeftModel):
        if adapter not in (None, BASE):
            raise AdapterNameError(f"There is no adapter '{adapter}': the model has none.")
        yield
    elif adapter in (None, BASE):
        with model.disable_adapter():
            yield
    else:
        before, trainable = model.active_adapters, [p for p in model.parameters() if p.requires_grad]
        model.set_adapter(adapter, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)
            for parameter in trainable:
                parameter.requires_grad_(True)


def _base_of(folder: str | None, config: Any) -> str:
    """The base that an adapter names."""
    if config is None:
        raise BaseModelError("Name a model, or an adapter that knows its base model.")
    base = config.base_model_name_or_path
    if not base:
        raise BaseModelError(f"The adapter {folder} does not name its base model: give it (--model).")
    if Path(base).is_absolute() and not Path(base).exists():
        raise BaseModelError(f"The adapter {folder} names {base} as its base, which is not there: give it (--model).")
    return str(base)


def _task(config: Any) -> str | None:
    task = getattr(config, "task_type", None)
    return getattr(task, "value", task)


def _load_base(base: str, revision: str | None, config: Any, dtype: str, device: str) -> Any:
    path = Path(base).expanduser()
    if not path.exists() and (path.is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise BaseModelError(f"There is no folder {base}.")
    if path.is_dir() and not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        below = adapters_below(path)
        hint = f" It holds adapters: give one of them, such as {below[-1]}" if below else ""
        raise BaseModelError(f"{base} is no model: it has no config.json.{hint}")
    place = resolve_base(base)
    try:
        loaded = _base_class(config).from_pretrained(place, dtype=dtype, revision=revision)
    except (OSError, ValueError, RuntimeError, KeyError) as e:  # what from_pretrained raises for what it cannot read
        raise BaseModelError(f"The model {base} cannot be loaded: {e}") from e
    if not getattr(loaded, "is_quantized", False):
        loaded.to(device)
    return loaded


def _base_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    task = _task(config)
    if config is None or (task is None and not config.auto_mapping):
        return AutoModelForCausalLM
    return AutoPeftModel._base_class(config, task, "the adapter", ())


def _has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer_config.json").is_file()


def _tokenizer(place: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError):  # there is none, or transformers does not know the model's
        return None


__all__ = ["BASE", "NULL", "AdapterFileError", "Opened", "adapter_folder", "named", "open_model", "using"]
