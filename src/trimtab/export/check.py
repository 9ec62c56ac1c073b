"""Whether other programs can use an adapter, asked before training (`check_config`) or after (`check_adapter`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.config import CONFIG_NAME, PeftConfig
from trimtab.core.io import locate
from trimtab.errors import ConfigError
from trimtab.export.rules import ENGINES, NEEDS, WRONG, Subject, names_of
from trimtab.files.finding import adapter_folder
from trimtab.files.sources import PACKAGED, cache_folder
from trimtab.files.store import load_peft_weights


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with an adapter that it should not, or that needs something from you."""

    engine: str
    verdict: str  # "refused": it stops with an error; "wrong": it computes something else, silently; "needs": a step
    what: str
    fix: str

    @property
    def fault(self) -> bool:
        """Whether the adapter cannot be used there as it is."""
        return self.verdict != NEEDS


def check_config(
    config: PeftConfig | Mapping[str, Any],
    targets: Iterable[str] = (),
    engines: Sequence[str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """What engines would refuse or get wrong of an adapter with this config: to be asked before training.

    Args:
        config: the adapter's config, or the content of an `adapter_config.json`.
        targets: the paths of the modules it adapts; without them the config's own names are looked at.
        engines: some of `ENGINES`; None: all.
        base: the content of the base's config.json, where it is at hand.

    Raises:
        ConfigError: an engine that is not known.
    """
    raw = config.to_json() if isinstance(config, PeftConfig) else config
    return _run(Subject(raw, _targets(raw, targets), base=base or base_config(raw)), engines)


def check_adapter(adapter: str | os.PathLike[str], engines: Sequence[str] | None = None) -> list[Finding]:
    """What engines would refuse or get wrong of an adapter in a folder or on the Hub.

    Raises:
        ConfigError: an engine that is not known.
        AdapterFileError: it is no adapter, or a file of it cannot be read.
    """
    wanted = known(engines)
    source = adapter_folder(adapter)
    file = locate(source, CONFIG_NAME)
    assert file is not None
    config = PeftConfig.from_json_file(file)
    tensors = load_peft_weights(source)
    modules = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors if ".lora_" in k}
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    found = _run(Subject(config, tuple(modules) or _targets(config, ()), shapes, base_config(config), True), wanted)
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        what = f"answers with NaN: {len(broken)} of {len(tensors)} tensors hold NaN or infinity (trimtab inspect)"
        found += [Finding(engine, WRONG, what, "train again: the run broke down") for engine in wanted]
    return found


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the base model's config.json, where it is on this machine; the network is never asked."""
    name = str(config.get("base_model_name_or_path") or "")
    places = [Path(name).expanduser() / "config.json"] if name else []
    if name.lower() in PACKAGED:
        places.append(cache_folder() / PACKAGED[name.lower()].name / "config.json")
    elif name.count("/") == 1 and not places[0].is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        places += [Path(cached)] if isinstance(cached, str) else []
    found = next((p for p in places if p.is_file()), None)
    return json.loads(found.read_text(encoding="utf-8")) if found is not None else {}


def _run(subject: Subject, engines: Sequence[str] | None) -> list[Finding]:
    return [
        Finding(name, *found)
        for name in known(engines)
        for rule in ENGINES[name].rules
        for found in rule(subject)
    ]  # fmt: skip


def known(engines: Sequence[str] | None) -> list[str]:
    """The names of engines as `ENGINES` has them; None: all.

    Raises:
        ConfigError: one that there are no rules for.
    """
    aliases = {"llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "mlx-lm": "mlx"}
    wanted = [aliases.get(e.lower(), e.lower()) for e in engines or ENGINES]
    unknown = [e for e in wanted if e not in ENGINES]
    if unknown:
        raise ConfigError(f"No rules for {names_of(unknown)}. Known: {', '.join(ENGINES)}.")
    return list(dict.fromkeys(wanted))


def _targets(config: Mapping[str, Any], targets: Iterable[str]) -> tuple[str, ...]:
    own = config.get("target_modules") or ()
    return tuple(targets) or ((own,) if isinstance(own, str) else tuple(own))
