"""What other programs refuse of an adapter, or compute differently: a table of rules, each a small function.

A rule sees an adapter's config, and its tensors where there are any yet. Each engine says in which version its rules
were read; a newer one may do more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.core.config import BEYOND, PeftType
from trimtab.files.factors import EMBEDDING, LAYER

REFUSED, WRONG, NEEDS = "refused", "wrong", "needs"  # the last is no fault: a flag or a step to take

MERGE = "merge it into its base (trimtab merge)"
# Starts that change the base: B·A is right on the changed base only.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
PLAIN_LORA = "save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=<its start>)"


@dataclass(frozen=True)
class Subject:
    """What the rules look at."""

    config: Mapping[str, Any]  # as in adapter_config.json
    targets: tuple[str, ...] = ()  # names or paths of the adapted modules
    keys: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # key of each tensor -> its shape; once trained
    base: Mapping[str, Any] = field(default_factory=dict)  # the base's config.json, where it is at hand
    trained: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the config, or the default where it is missing or empty."""
        return self.config.get(name) or default

    @property
    def method(self) -> str:
        """Its peft_type."""
        return str(self.config.get("peft_type"))

    @property
    def ranks(self) -> set[int]:
        """Every rank it has."""
        return {int(self.get("r", 8)), *map(int, self.get("rank_pattern", {}).values())}

    @property
    def changed_base(self) -> bool:
        """Whether its start changed the base."""
        start = self.config.get("init_lora_weights")
        return isinstance(start, str) and start.lower().startswith(CHANGED_BASE)

    @property
    def odd_keys(self) -> list[str]:
        """The tensors that are no pair of factors, and no base weight that is saved along with an adapted embedding."""
        return [k for k in self.keys if not k.endswith((*LAYER, *EMBEDDING, ".base_layer.weight"))]

    @property
    def trains_biases(self) -> bool:
        """Whether biases of the base are trained; once trained, whether the file holds any."""
        held = not self.trained or any(k.endswith(".bias") for k in self.odd_keys)
        return self.get("bias", "none") != "none" and held

    def adapts(self, *names: str) -> list[str]:
        """Which of these modules it adapts, by the end of their paths."""
        return [n for n in names if any(t == n or t.endswith("." + n) for t in self.targets)]


Found = Iterator[tuple[str, str, str]]  # (verdict, what, fix)
Rule = Callable[[Subject], Found]


# --- rules of several engines -----------------------------------------------------------------------------------------


def lora_only(s: Subject) -> Found:
    """Most engines read LoRA and nothing else."""
    if s.method != "LORA":
        yield REFUSED, f"reads LoRA, not {s.method}", MERGE


def start_that_changed_the_base(s: Subject) -> Found:
    """An engine that does not look at the start adds B·A to the base as it was."""
    if s.changed_base:
        start = s.config["init_lora_weights"]
        yield WRONG, f"adds the update to the original base, but init_lora_weights={start!r} changed it", PLAIN_LORA


def other_formulas(s: Subject) -> Found:
    """Fields that make the pair of factors part of another formula than s·B·A."""
    for name in ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"):
        if s.get(name):
            yield WRONG, f"adds s·B·A, and {name} says another formula", f"{MERGE}, or train without {name}"


def one_alpha_over_r(s: Subject) -> Found:
    """llama.cpp and Ollama compute lora_alpha / (rank of the tensor), whatever else the config says."""
    if s.get("use_rslora"):
        r = max(s.ranks)
        fix = f"write use_rslora false and lora_alpha {s.get('lora_alpha', 8) * r**0.5:g} (alpha times sqrt(r))"
        fix = fix if len(s.ranks) == 1 else "scale B by sqrt(r) of its layer"
        yield WRONG, f"ignores use_rslora: the update comes out sqrt({r}) = {r**0.5:.1f} times too weak", fix
    if s.get("alpha_pattern"):
        yield WRONG, "ignores alpha_pattern: every layer gets lora_alpha", "scale the B of those layers instead"


def parts_beside_the_factors(s: Subject) -> Found:
    """Tensors that are neither A nor B, by the fields that make them."""
    for name, what in (("use_dora", "DoRA's magnitudes"), ("lora_bias", "the biases of B (lora_bias)")):
        if s.get(name):
            yield REFUSED, f"does not read {what}", f"{MERGE}, or train without {name}"
    if s.trains_biases:
        yield REFUSED, f"does not read trained biases (bias={s.get('bias')!r})", f"{MERGE}, or train with bias='none'"
    if saved := s.get("modules_to_save"):
        yield REFUSED, f"does not read modules that are saved whole ({names_of(saved)})", f"{MERGE}, or adapt them"
    if s.get("trainable_token_indices"):
        yield REFUSED, "does not read trained tokens (trainable_token_indices)", MERGE
    if s.get("layer_replication"):
        yield REFUSED, "does not rebuild the stack of layers (layer_replication)", MERGE


def resized_embeddings(s: Subject) -> Found:
    """New tokens: the whole embedding lies in the file."""
    whole = [k for k in s.odd_keys if k.endswith((".embed_tokens.weight", ".lm_head.weight"))]
    if whole and not s.get("modules_to_save"):
        yield REFUSED, f"does not read whole embeddings ({len(whole)} in the file: new tokens?)", MERGE


# --- vLLM -------------------------------------------------------------------------------------------------------------

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_fields(s: Subject) -> Found:
    """What its PEFT reader turns away by name."""
    for name, what in (
        ("use_dora", "DoRA"), ("lora_bias", "a bias on B (lora_bias)"), ("alora_invocation_tokens", "aLoRA"),
        ("layer_replication", "layer_replication"), ("use_bdlora", "BD-LoRA"), ("use_qalora", "QA-LoRA"),
    ):  # fmt: skip
        if s.get(name):
            yield REFUSED, f"refuses {what}", f"{MERGE}, or train without {name}"
    if s.get("bias", "none") != "none":
        yield REFUSED, f"refuses bias={s.get('bias')!r}", f"{MERGE}, or train with bias='none'"
    saved = [m for m in s.get("modules_to_save", ()) if m not in ("classifier", "score")]
    if saved:
        yield (
            REFUSED,
            f"takes whole classifier or score heads only, not {names_of(saved)}",
            f"{MERGE}, or adapt them by LoRA",
        )
    if s.get("trainable_token_indices"):
        yield REFUSED, "does not know the tensors of trainable_token_indices", MERGE
    if s.changed_base:
        start = s.config["init_lora_weights"]
        yield REFUSED, f"refuses init_lora_weights={start!r}, which changed the base", PLAIN_LORA


def vllm_rank(s: Subject) -> Found:
    """One of a few largest ranks is chosen when the server starts; 16 unless told otherwise."""
    r = max(s.ranks)
    if s.method != "LORA" or r <= 16:
        return
    allowed = next((a for a in VLLM_RANKS if a >= r), None)
    if allowed is None:
        yield REFUSED, f"serves ranks up to {VLLM_RANKS[-1]}, not {r}", "cut it down: trimtab rank"
    else:
        yield (
            NEEDS,
            f"serves ranks up to 16 unless told otherwise; this one has {r}",
            f"vllm serve --max-lora-rank {allowed}",
        )


def vllm_modules(s: Subject) -> Found:
    """It adapts linear layers; embeddings where the model's class lists them; experts in a layout of its own."""
    if s.get("target_parameters"):
        what = "reads experts that are kept in one tensor for a few models only, and serves the others' base silently"
        yield WRONG, f"{what} (vllm#52198)", MERGE
    if ends := s.adapts("embed_tokens", "lm_head"):
        yield (
            NEEDS,
            f"adapts {names_of(ends)} only where the model's class lists it, and raises elsewhere",
            "try it, or " + MERGE,
        )
    if any(len(shape) > 2 for shape in s.keys.values()):
        yield REFUSED, "adapts linear layers, not convolutions", MERGE


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_cpp_layout(s: Subject) -> Found:
    """It reads GGUF."""
    if s.trained and s.method == "LORA":
        yield NEEDS, "reads GGUF, not this folder", "convert_lora_to_gguf.py --base <base's folder> <this folder>"


def llama_cpp_tied(s: Subject) -> Found:
    """Where one weight serves as embedding and head, it takes an adapter of neither (both tried with SmolLM2)."""
    if not s.base.get("tie_word_embeddings", True):
        return
    when = "the base ties them" if "tie_word_embeddings" in s.base else "where the base ties them"
    if s.adapts("lm_head"):
        yield (
            REFUSED,
            f"does not load an adapted lm_head apart from the embedding ({when})",
            f"{MERGE}, or leave it out",
        )
    if s.adapts("embed_tokens"):
        yield REFUSED, f"aborts on an adapted embedding that is the head, too ({when})", f"{MERGE}, or leave it out"


def llama_cpp_experts(s: Subject) -> Found:
    """The converter knows no factors of several experts in one."""
    if s.get("target_parameters"):
        yield REFUSED, "does not convert factors of experts that lie in one tensor (target_parameters)", MERGE


def llama_cpp_parts(s: Subject) -> Found:
    """It stops at what is no factor, but for norms, which it converts and then passes over."""
    saved = s.get("modules_to_save", ())
    norms = [m for m in saved if "norm" in m]
    if norms:
        yield WRONG, f"passes over trained norms ({names_of(norms)}) without a word", MERGE
    rest = {**s.config, "modules_to_save": [m for m in saved if m not in norms]}
    yield from parts_beside_the_factors(replace(s, config=rest))


# --- Ollama -----------------------------------------------------------------------------------------------------------

OLLAMA_TYPES = ("llama", "mistral", "gemma2")
OLLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ollama_architecture(s: Subject) -> Found:
    """ADAPTER takes safetensors for two architectures."""
    known = s.base.get("model_type")
    if known is None:
        yield (
            NEEDS,
            "imports safetensors adapters of Llama and Gemma 2 only; the base's type is not known here",
            ("see that the base is one of them, or give it a GGUF adapter"),
        )
    elif known not in OLLAMA_TYPES:
        yield (
            REFUSED,
            f"imports safetensors adapters of Llama and Gemma 2 only, not of {known}",
            (f"convert it to GGUF first (convert_lora_to_gguf.py), or {MERGE}"),
        )


def ollama_modules(s: Subject) -> Found:
    """It knows the names of seven projections."""
    others = sorted({t.rpartition(".")[2] for t in s.targets} - set(OLLAMA_MODULES) - {"all-linear"})
    if others and s.method == "LORA":
        yield (
            REFUSED,
            f"does not know the tensors of {names_of(others)}",
            f"{MERGE}, or adapt {names_of(OLLAMA_MODULES)} only",
        )


def ollama_alpha(s: Subject) -> Found:
    """lora_alpha is read as a whole number."""
    alpha = s.get("lora_alpha", 8)
    if isinstance(alpha, float):
        yield (
            REFUSED,
            f"reads lora_alpha as a whole number; it is {alpha!r}",
            "write a whole number, and scale B by the rest",
        )


# --- MLX --------------------------------------------------------------------------------------------------------------


def mlx_layout(s: Subject) -> Found:
    """It reads a layout of its own."""
    if s.trained and s.method == "LORA":
        yield (
            REFUSED,
            "reads adapters.safetensors with a config of its own, not PEFT's folder",
            (f"{MERGE} and convert that: mlx_lm.convert --hf-path <merged>"),
        )


def mlx_one_rank(s: Subject) -> Found:
    """`lora_parameters` has one rank and one scale."""
    if len(s.ranks) > 1:
        yield REFUSED, f"has one rank for all layers, not {sorted(s.ranks)}", "train without rank_pattern, or " + MERGE
    if s.get("alpha_pattern"):
        yield WRONG, "has one scale for all layers: alpha_pattern is lost", "scale B, or " + MERGE


def mlx_parts(s: Subject) -> Found:
    """Its adapters have factors and DoRA's magnitudes, nothing else."""
    for verdict, what, fix in parts_beside_the_factors(s):
        if "DoRA" not in what:
            yield verdict, what, fix
    if s.get("target_parameters"):
        yield REFUSED, "keeps factors of experts in another layout", MERGE


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_method(s: Subject) -> Found:
    """It knows the methods of its own enumeration."""
    if s.method not in {t.value for t in set(PeftType) - BEYOND}:
        yield REFUSED, f"does not know the method {s.method}", MERGE


def peft_experts(s: Subject) -> Found:
    """It will not build dropout on a parameter, not even for inference, where there is none."""
    if s.get("target_parameters") and s.get("lora_dropout", 0):
        yield (
            REFUSED,
            "does not load adapters of experts that were trained with dropout",
            ("set lora_dropout to 0 in adapter_config.json: inference has none"),
        )


@dataclass(frozen=True)
class Engine:
    """A program that uses adapters, and its rules."""

    read_in: str  # the version in which the rules were read
    rules: tuple[Rule, ...]


ENGINES: dict[str, Engine] = {
    "vllm": Engine("0.32.0", (lora_only, other_formulas, vllm_fields, vllm_rank, vllm_modules, resized_embeddings)),
    "llama.cpp": Engine(
        "b11549",
        (lora_only, other_formulas, llama_cpp_layout, start_that_changed_the_base, one_alpha_over_r, llama_cpp_parts,
         resized_embeddings, llama_cpp_tied, llama_cpp_experts),
    ),
    "ollama": Engine(
        "2026 sources",
        (lora_only, other_formulas, ollama_architecture, ollama_modules, ollama_alpha, start_that_changed_the_base,
         one_alpha_over_r, parts_beside_the_factors, resized_embeddings, llama_cpp_experts),
    ),
    "mlx": Engine(
        "0.32.2",
        (lora_only, other_formulas, mlx_layout, mlx_one_rank, mlx_parts, start_that_changed_the_base),
    ),
    "peft": Engine("0.21.2", (peft_method, peft_experts)),
}  # fmt: skip


def names_of(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
