"""Random runs of trimtab beside the installed peft: the same operations on one adapted model, answer by answer.

    PYTHONPATH=src:.oracle:. python tools/differential.py 0 300 [METHOD ...]

Each number is the seed of a run: a method with fields drawn at random, on a small model, and up to nine operations
(forward, gradients, merge, set, add, load, combine ...). Printed is, once a kind, where peft gives an answer and
trimtab another, or none. What differs on purpose (docs/differences.md) is not known here: read what is printed.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trimtab
from tests.parity.models import batch, build, tensor_of
from tests.parity.pairs import parameters, stir, trainable
from trimtab.methods import METHODS, capabilities, config_class, load

MODELS: dict[str, list[str]] = {
    "toy": ["embed", "plain", "biased", "conv"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
    "bert_seq": ["query", "value", "dense"],
    "t5": ["q", "v", "wi", "wo"],
    "conv": ["one", "two", "three", "point"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert_seq": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
WHOLE = {"toy": "my_score", "llama": "lm_head", "gpt2": "lm_head", "bert_seq": "classifier", "t5": "lm_head"}
PROMPTS = set("PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING CPT CARTRIDGE ADAPTION_PROMPT".split())
APART = {"XLORA", "SHADOW", "POLY", "TRAINABLE_TOKENS"}  # they ask for more than a config
DRAWN = {"UNILORA", "TINYLORA", "FROD", "OSF", "ADALORA", "ADAMSS"}  # their tensors cannot be copied by name
NUMBERS: dict[str, list[Any]] = {"r": [1, 2, 4], "lora_alpha": [1, 4, 7], "use_rslora": [True], "lora_bias": [True]}


def methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """{method: (peft_type, the fields it needs)} of those that peft has, too."""
    found = {}
    for facts in capabilities():
        kind, _, field = facts.method.partition(" ")
        if kind in APART or not hasattr(peft.PeftType, kind) or "arrow" in field or "qalora" in field:
            continue
        file, cls, _ = METHODS[kind]
        place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
        found[facts.method] = (kind, dict(load(*place).example))
    return found


def theirs_of(value: Any) -> Any:
    """A config within a config, as peft's."""
    if not dataclasses.is_dataclass(value):
        return copy.deepcopy(value)
    return getattr(peft, type(value).__name__)(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


class Side:
    """One of the two libraries, and its model."""

    def __init__(self, library: Any, name: str) -> None:
        self.library, self.name, self.base = library, name, build(name)
        self.model: Any = None

    def config(self, kind: str, fields: dict[str, Any]) -> Any:
        if self.library is trimtab:
            return config_class(kind)(**copy.deepcopy(fields))
        return peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{k: theirs_of(v) for k, v in fields.items()})

    def forward(self, model: Any = None, **more: Any) -> Tensor:
        model = self.model if model is None else model
        model.eval()
        with torch.no_grad():
            return tensor_of(model(**batch(self.name), **more))

    def gradients(self) -> dict[str, Tensor]:
        self.model.eval()
        self.model.zero_grad()
        out = tensor_of(self.model(**batch(self.name)))
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            (out * weights).square().mean().backward()
        return {n: p.grad.clone() for n, p in parameters(self.model).items() if p.grad is not None}


def draw(rng: random.Random, method: tuple[str, dict[str, Any]], model: str) -> tuple[str, dict[str, Any]]:
    """A method's fields at random."""
    kind, example = method
    fields, known = dict(example), {f.name: f for f in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if kind not in PROMPTS:
        picked = rng.sample(MODELS[model], rng.randint(1, 3))
        fields["target_modules"] = picked if rng.random() < 0.8 or model == "conv" else f".*({'|'.join(picked)})"
        if rng.random() < 0.15 and model in TASKS:
            fields["target_modules"] = "all-linear"
        if "modules_to_save" in known and model in WHOLE and rng.random() < 0.25:
            fields["modules_to_save"] = [WHOLE[model]]
        if isinstance(fields["target_modules"], list) and "layers_to_transform" in known and rng.random() < 0.1:
            fields["layers_to_transform"] = rng.choice([0, [1], [0, 1]])
        for name, choices in NUMBERS.items():
            if name in known and isinstance(known[name].default, int) and rng.random() < 0.25:
                fields[name] = rng.choice(choices)
    if model in TASKS and (kind in PROMPTS or rng.random() < 0.6):
        fields["task_type"] = TASKS[model]
    return kind, fields


def attempt(function: Callable[[], Any]) -> tuple[bool, Any]:
    """(whether it went, what it gave or raised)."""
    torch.manual_seed(5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return True, function()
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error)[:160]}"


def apart(a: Any, b: Any, limit: float = 2e-4) -> str | None:
    """Where ours (a) and theirs (b) differ, or None."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        a, b = a.double(), b.double()
        off = float((a - b).nan_to_num().abs().max() / max(1.0, float(b.nan_to_num().abs().max()))) if a.numel() else 0
        return f"off by {off:.1e}" if off > limit else None
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"keys {sorted(map(str, a.keys() - b.keys()))[:4]} and {sorted(map(str, b.keys() - a.keys()))[:4]}"
        return next((f"{k}: {found}" for k in a if (found := apart(a[k], b[k], limit))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return next((f"{i}: {found}" for i, pair in enumerate(zip(a, b)) if (found := apart(*pair, limit))), None)
    return None if a == b else f"{str(a)[:150]} and {str(b)[:150]}"


def saved(side: Side) -> dict[str, Any]:
    """What saving writes."""
    with tempfile.TemporaryDirectory() as folder:
        side.model.save_pretrained(folder)
        files = [p for p in sorted(Path(folder).rglob("*.safetensors")) if p.stem != "training_state"]
        return {str(p.relative_to(folder)): load_file(p) for p in files}


class Run:
    """One seed's run."""

    def __init__(self, seed: int, known: dict[str, tuple[str, dict[str, Any]]]) -> None:
        self.rng = random.Random(seed)
        self.method = self.rng.choice(list(known))
        self.drawn = known[self.method]
        choices = list(TASKS) if self.drawn[0] in PROMPTS else list(MODELS)
        self.name = self.rng.choice(choices)
        self.sides = Side(trimtab, self.name), Side(peft, self.name)
        self.first = draw(self.rng, self.drawn, self.name)
        self.adapters, self.made = ["default"], 1
        self.log = [f"{self.method} on {self.name}: {self.first[1]}"]

    def ask(self, label: str, function: Callable[[Side], Any]) -> tuple[str, str] | bool:
        """The same question to both: (what is wrong, where), or whether both answered."""
        self.log.append(label)
        (fine, ours), (right, theirs) = (attempt(lambda s=s: function(s)) for s in self.sides)
        if fine and right:
            found = apart(ours, theirs)
            return (label.split(" ")[0], found) if found else True
        return (label.split(" ")[0], f"ours fails, {ours}") if right else False

    def grow(self, name: str, label: str, function: Callable[[Side], Any]) -> tuple[str, str] | bool:
        """`ask` a question that adds an adapter."""
        found = self.ask(label, function)
        if found is True:
            self.adapters.append(name)
        return found

    def sync(self) -> None:
        """Give ours what theirs holds, stirred."""
        stir(self.sides[1].model, 0.1)
        given = parameters(self.sides[1].model) | dict(self.sides[1].model.named_buffers())
        with torch.no_grad():
            for name, tensor in (parameters(self.sides[0].model) | dict(self.sides[0].model.named_buffers())).items():
                if name in given and given[name].shape == tensor.shape:
                    tensor.copy_(given[name])

    def go(self) -> tuple[str, str] | None:
        """The first thing that differs."""

        def make(side: Side) -> set[str]:
            torch.manual_seed(11)
            side.model = side.library.get_peft_model(side.base, side.config(*self.first))
            return set() if self.first[0] in DRAWN else trainable(side.model)

        found = self.ask("make", make)
        if found is not True or self.first[0] in DRAWN:
            return found if isinstance(found, tuple) else None
        self.sync()
        for _ in range(self.rng.randint(3, 9)):
            operation = getattr(self, self.rng.choice(OPERATIONS))
            found = operation()
            if isinstance(found, tuple):
                return found
            if found is False and operation.__name__ in ("add", "read", "delete", "merge", "weighted"):
                return None  # refused by theirs
        return None

    # ------------------------------------------------------------------ operations
    def forward(self) -> Any:
        return self.ask("forward", Side.forward)

    def gradients(self) -> Any:
        return self.ask("gradients", Side.gradients)

    def merge(self) -> Any:
        return self.ask("merge", lambda s: (s.model.merge_adapter(), s.forward())[1])

    def unmerge(self) -> Any:
        return self.ask("unmerge", lambda s: (s.model.unmerge_adapter(), s.forward())[1])

    def choose(self) -> Any:
        some = self.rng.sample(self.adapters, self.rng.randint(1, min(2, len(self.adapters))))

        def act(side: Side) -> Any:
            (side.model if len(some) == 1 else side.model.base_model).set_adapter(some[0] if len(some) == 1 else some)
            return side.forward(), trainable(side.model)

        return self.ask(f"set {some}", act)

    def add(self) -> Any:
        name, self.made = f"a{self.made}", self.made + 1
        fields = self.first if self.rng.random() < 0.6 else draw(self.rng, self.drawn, self.name)

        def act(side: Side) -> list[str]:
            side.model.add_adapter(name, side.config(*fields))
            return sorted(side.model.peft_config)

        found = self.grow(name, f"add {name} {fields[1]}", act)
        if found is True:
            self.sync()
        return found

    def delete(self) -> Any:
        if len(self.adapters) < 2:
            return True
        name = self.adapters.pop(self.rng.randrange(len(self.adapters)))
        return self.ask(
            f"delete {name}", lambda s: (s.model.delete_adapter(name), s.model.active_adapters, s.forward())[1:]
        )

    def save(self) -> Any:
        return self.ask("save", saved)

    def state(self) -> Any:
        return self.ask("state", lambda s: s.library.get_peft_model_state_dict(s.model))

    def read(self) -> Any:
        """A file of theirs, by both."""
        name, folder = f"a{self.made}", Path(tempfile.mkdtemp())
        source = self.rng.choice(self.adapters)
        if not attempt(lambda: self.sides[1].model.save_pretrained(folder))[0]:
            return True
        folder = folder / source if (folder / source).exists() else folder
        self.made += 1

        def act(side: Side) -> Any:
            side.model.load_adapter(folder, name)
            side.model.set_adapter(name)
            return side.forward()

        return self.grow(name, f"read {source}", act)

    def weighted(self) -> Any:
        if len(self.adapters) < 2:
            return True
        two, name, how = self.rng.sample(self.adapters, 2), f"a{self.made}", self.rng.choice(["linear", "cat", "svd"])
        self.made += 1

        def act(side: Side) -> Tensor:
            side.model.add_weighted_adapter(two, [0.5, -1.0], name, combination_type=how)
            side.model.set_adapter(name)
            return side.forward()

        return self.grow(name, f"weighted {how} {two}", act)

    def copied(self) -> Any:
        return self.ask("copied", lambda s: s.forward(copy.deepcopy(s.model)))

    def merged(self) -> Any:
        return self.ask("merged", lambda s: s.forward(copy.deepcopy(s.model).merge_and_unload()))

    def mixed(self) -> Any:
        if not self.method.startswith("LORA"):
            return True
        rows = [self.rng.choice([*self.adapters, "__base__"]) for _ in range(3)]
        return self.ask(f"mixed {rows}", lambda s: s.forward(adapter_names=rows))

    def generated(self) -> Any:
        if self.name not in ("llama", "gpt2"):
            return True
        ids = batch(self.name)["input_ids"]
        return self.ask("generated", lambda s: s.model.eval().generate(input_ids=ids, max_new_tokens=4, pad_token_id=0))

    def counted(self) -> Any:
        return self.ask("counted", lambda s: s.model.get_nb_trainable_parameters())

    def configured(self) -> Any:
        def act(side: Side) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                side.model.save_pretrained(folder)
                found = {}
                for path in sorted(Path(folder).rglob("adapter_config.json")):
                    content = json.loads(re.sub(r'"peft_version": "[^"]*"', '"peft_version": ""', path.read_text()))
                    plain = {k: sorted({*map(str, v)}) if isinstance(v, list) else v for k, v in content.items()}
                    found[str(path.relative_to(folder))] = plain
                return found

        return self.ask("configured", act)


OPERATIONS = (
    "forward gradients merge unmerge choose add delete save state read weighted copied merged mixed generated counted "
    "configured"
).split()


def main() -> None:
    first, last, *only = sys.argv[1:]
    known = {name: found for name, found in methods().items() if not only or name in only}
    torch.set_num_threads(1)
    assert issubclass(trimtab.PeftModel, nn.Module)
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    for seed in range(int(first), int(last)):
        run = Run(seed, known)
        if (found := run.go()) is None:
            continue
        label, text = found
        kind = (run.method, label, text[:40])
        seen[kind] += 1
        if seen[kind] == 1:
            print(f"[{seed}] {label}: {text}", *run.log, sep="\n    ", flush=True)
    print(f"{int(last) - int(first)} runs, {sum(seen.values())} with a difference, {len(seen)} kinds of them")


if __name__ == "__main__":
    main()
