"""Every verb by name: the function that does it, and its line of help. Only the verb that is asked for is imported."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb is, and what it is for."""

    place: str  # module:function
    line: str  # the first line of the function's docstring
    run: bool = False  # it takes the settings of a training run: a config file, rows, and fields of the method
    hidden: bool = False


VERBS = {
    "eval": Verb(
        "eval:evaluate", "Score a model or adapter on rows: loss, perplexity, exact match, accuracy, fields of JSON."
    ),
    "generate": Verb(
        "generate:generate",
        "Answer prompts, greedily by default; several adapters answer in one batch. Without a prompt, stdin is one.",
    ),
    "chat": Verb(
        "chat:chat",
        "Talk to a model and switch its adapters as you go: /adapter NAME, /base, /compare, /reset, /help, /quit.",
    ),
    "compare": Verb(
        "compare:compare",
        "Show what an adapter changes: answers side by side, losses, accuracy, and a random adapter of the same size.",
    ),
    "merge": Verb(
        "merge:merge",
        "Merge adapters into their base, save a whole model, and say how far its logits are off. Also called fuse.",
    ),
    "fuse": Verb("merge:merge", "The same as merge.", hidden=True),
    "combine": Verb(
        "combine:combine",
        "Combine adapters into one, from their files: weighted sums, SVD, TIES, DARE, magnitude pruning.",
    ),
    "inspect": Verb(
        "inspect:inspect",
        "Show what is in an adapter's files: config, sizes, norms, ranks that are used, NaN. No base model is needed.",
    ),
    "diff": Verb(
        "diff:diff",
        "Show how two adapters differ: configs, the angle between their deltas, how one would disturb the other.",
    ),
    "check": Verb(
        "check:check",
        "Show what other programs would refuse of an adapter, or silently compute otherwise, and what to do about it.",
    ),
    "train": Verb("train:train", "Train an adapter: rows in, adapter out.", run=True),
    "dpo": Verb("trl:dpo", "Learn from pairs, by TRL's DPOTrainer: rows of prompt, chosen and rejected.", run=True),
    "kto": Verb(
        "trl:kto",
        "Learn from answers that are good or not, by TRL's KTOTrainer: rows of prompt, completion and label.",
        run=True,
    ),
    "reward": Verb(
        "trl:reward",
        "Train a model that scores answers, by TRL's RewardTrainer: rows of chosen and rejected.",
        run=True,
    ),
    "grpo": Verb(
        "trl:grpo", "Learn from rewards for the model's own answers, by TRL's GRPOTrainer: rows of prompt.", run=True
    ),
    "demo": Verb(
        "demo:demo", "Fine-tune a LoRA on real data, show what it learned, and load it again in a fresh process."
    ),
    "methods": Verb(
        "methods:methods",
        "Show what each method is for and can do: its formula, the layers it adapts, mixed batches, merging.",
    ),
    "version": Verb("version:version", "Show the versions of trimtab and of the libraries it stands on."),
    "rank sweep": Verb(
        "sweep:sweep",
        "Measure which rank a task needs: every rank and learning rate over one base model, and what to take.",
        run=True,
    ),
    "rank inspect": Verb(
        "rank:inspect",
        "Show the ranks an adapter really has: singular values and effective ranks of each layer's change.",
    ),
    "rank mend": Verb(
        "rank:mend", "Scale a LoRA's intruder dimensions down, for what the base knew before; the rank stays."
    ),
    "rank resize": Verb(
        "rank:resize",
        "Cut a LoRA down to another rank, or grow it, and say what is lost. The base model is not needed.",
    ),
    "rank suggest": Verb(
        "rank:suggest", "Say which rank a task asks for: by its size in a second, with --estimate by its gradients too."
    ),
}
GROUPS = {
    "": "Adapt large frozen models with a few trained parameters.",
    "rank": "The rank r: what is used, what fits, what a task asks for.",
}


def function_of(verb: str) -> Callable[..., None]:
    """The function of a verb; imports its module."""
    module, _, name = VERBS[verb].place.partition(":")
    function: Callable[..., None] = getattr(import_module(f"trimtab.cli.{module}"), name)
    return function


def members(group: str) -> dict[str, str]:
    """{verb or group: its line of help} of a group, without the hidden."""
    before = f"{group} ".lstrip()
    lines = {name: verb.line for name, verb in VERBS.items() if not verb.hidden}
    lines |= {name: line for name, line in GROUPS.items() if name}
    own = {name.removeprefix(before): line for name, line in lines.items() if name.startswith(before)}
    return {name: line for name, line in own.items() if " " not in name}


def asked(arguments: list[str]) -> str | None:
    """The verb or group whose help the words of a command line ask for ("" is the whole command), or None."""
    words = arguments[: arguments.index("--help")] if "--help" in arguments else ["--"]
    name = " ".join(words[: 2 if "".join(words[:1]) in GROUPS else 1])
    return name if (name in VERBS or name in GROUPS) and "--" not in words else None
