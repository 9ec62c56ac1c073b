"""The table of methods: what each class says of itself, and what follows from it on a model of reference."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.core.model_method import Mixture
from trimtab.errors import NoMatchingPeftModuleError
from trimtab.export.rules import ENGINES, NEEDS, Subject
from trimtab.methods import METHODS, Capability, capabilities, config_class, load, method_class

# The shape of SmolLM2-135M, in the words of transformers' LlamaConfig.
REFERENCE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
HEAD = (
    "method",
    "when",
    "formula",
    "parameters",
    "layers",
    "merges",
    "mixed batch",
    "quantised base",
    "read by",
    "paper",
)


@dataclass(frozen=True)
class Row:
    """A method in the table.

    Attributes:
        trained: its parameters on the model of reference, at its defaults; None: it has nothing to adapt there.
        engines: the programs that read its file as it is.
    """

    facts: Capability
    trained: int | None
    engines: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the page, in the order of `HEAD`."""
        f = self.facts
        batch = "by itself" if "model" in f.kinds else "one product" if f.fused else "one product an adapter"
        base = "as it is" if not f.reads and (f.fused or "linear" not in f.kinds) else "read at each step"
        trained = "none there" if self.trained is None else f"{self.trained:,}"
        merges, engines = "yes" if f.mergeable else "no", ", ".join(self.engines)
        return f.method, f.when, f.formula, trained, ", ".join(f.kinds), merges, batch, base, engines, f.paper


def rows() -> list[Row]:
    """A row for each method and variant."""
    found = []
    for facts in capabilities():
        name, _, field = facts.method.partition(" ")
        file, cls, _ = METHODS[name]
        place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
        found.append(Row(facts, *measured(name, dict(load(*place).example))))
    return found


def measured(peft_type: str, fields: dict[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """(trained parameters on the model of reference, the programs that read the adapter's file)."""
    try:
        model = adapted(peft_type, fields, "meta")
        count: int = model.get_nb_trainable_parameters()[0]
    except NoMatchingPeftModuleError:
        return None, ()
    except NotImplementedError:  # it looks at the weights: what each further layer has is told by two small models
        two, model = (adapted(peft_type, fields, "cpu", layers) for layers in (2, 3))
        two, three = (m.get_nb_trainable_parameters()[0] for m in (two, model))
        count = three + (REFERENCE["num_hidden_layers"] - 3) * (three - two)
    graft = model.graft
    adapter = graft.adapters["default"]
    keys = {s.on_disk(): tuple(s.get().shape) for s in graft.slots(adapter) if not s.optional}
    base = {"model_type": "llama", **REFERENCE}
    targets = tuple(t.name for t in adapter.targets)
    subject = Subject(adapter.config.to_json(), targets, keys, base, trained=True)
    readers = [
        name
        for name, engine in ENGINES.items()
        if not any(verdict != NEEDS for rule in engine.rules for verdict, _, _ in rule(subject))
    ]
    return count, tuple(readers)


def adapted(peft_type: str, fields: dict[str, Any], device: str, layers: int | None = None) -> Any:
    """A model of the reference's shape, or of fewer layers and a small vocabulary, with one adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.shell.tasks import get_peft_model

    sizes = REFERENCE if layers is None else {**REFERENCE, "num_hidden_layers": layers, "vocab_size": 64}
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = LlamaForCausalLM(LlamaConfig(**sizes))
        config = config_class(peft_type)(task_type="CAUSAL_LM", **fields)
        method: Any = method_class(config)
        if issubclass(method, Mixture):  # among adapters of the method that can be weighed
            plain = next(load(f, c) for f, m, c in METHODS.values() if load(f, m).weighed)
            for name in method.among(config):
                model = get_peft_model(base, plain(), name, low_cpu_mem_usage=device == "meta")
            model.add_adapter("default", config, low_cpu_mem_usage=device == "meta")
            model.set_adapter("default")
            return model
        return get_peft_model(base, config, low_cpu_mem_usage=device == "meta")
