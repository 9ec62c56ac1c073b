"""A LoRA adapter as its files say it, layer by layer, without the base model: read, and written with other factors.

The factors of every kind of layer become matrices A (n, r, in) and B (n, out, r): n is 1 for most, the number of
experts for a stack of them, the number of groups for a grouped convolution. dW = s·B·A for each of the n.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig, type_name
from trimtab.core.targets import matches
from trimtab.errors import AdapterFileError
from trimtab.files import card, store
from trimtab.files.codec import PREFIX
from trimtab.files.factors import EMBEDDING, LAYER

EXPERTS = ("gate_up_proj", "down_proj")  # the parameters of a stack of experts, in the order of PEFT's nesting
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
# What may stand beside a pair; another tensor of LoRA's is part of a formula that is not s·B·A.
BESIDE = re.compile(r"\.(lora_B\.bias|lora_magnitude_vector(\.weight)?)$")
FORMULAS = {"use_bdlora": "BD-LoRA", "use_qalora": "QA-LoRA", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA"}
# Starts that change the base: such a file means what it says only beside the base its start left, for its rank.
STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of one layer (or of one parameter): dW = scale·B·A for each of the n matrices.

    Attributes:
        path: of the module, or of the parameter where a config names one.
        stem: what its keys on disk start with.
        embedding: whether its keys are an embedding's.
        form: how the n matrices lie in the file: "one", "groups" of a convolution, "stack" of experts.
        kernel: of a convolution, its input channels first.
        alpha: as the config has it.
    """

    path: str
    stem: str
    A: Tensor  # (n, r, in)
    B: Tensor  # (n, out, r)
    scale: float
    alpha: float
    embedding: bool = False
    form: str = "one"
    kernel: tuple[int, ...] = ()

    @property
    def owner(self) -> str:
        """The path by whose rank and alpha it goes: an attention's, for the layers inside that come along with it."""
        return _owner(self.stem, self.path)

    @property
    def step(self) -> int:
        """What one rank of each matrix adds to r: the groups of a convolution share it between them."""
        return len(self.A) if self.form == "groups" else 1

    @property
    def rank(self) -> int:
        """r, as the config has it."""
        return self.A.shape[1] * self.step

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW: (out, in), or (n, out, in)."""
        shape = (len(self.A), self.B.shape[1], self.A.shape[2])
        return shape[1:] if shape[0] == 1 else shape

    @property
    def cost(self) -> int:
        """The parameters of one rank of each matrix."""
        return len(self.A) * (self.A.shape[2] + self.B.shape[1])

    def grown(self, rank: int) -> Pair:
        """The same dW with `rank` rows in each A: from the new ones, which B ignores still, training can go on."""
        more = rank - self.A.shape[1]
        if more <= 0:
            return self
        draw = torch.Generator().manual_seed(0)
        fresh = torch.empty(len(self.A), more, self.A.shape[2]).uniform_(-1, 1, generator=draw)  # as LoRA starts
        A = torch.cat([self.A, (fresh / self.A.shape[2] ** 0.5).to(self.A.dtype)], 1)
        return replace(self, A=A, B=torch.nn.functional.pad(self.B, (0, more)))

    def tensors(self) -> dict[str, Tensor]:
        """The factors by their keys on disk, as they lie there."""
        A, B, n = self.A, self.B, len(self.A)
        A = A.flatten(0, 1)  # (n·r, in): one matrix after the other
        B = B.flatten(0, 1) if self.form == "groups" else B.movedim(0, -1).flatten(1)  # (out, r·n): n innermost
        if self.kernel:
            A, B = A.reshape(len(A), *self.kernel), B.reshape(*B.shape, *(1 for _ in self.kernel[1:]))
        assert self.form != "one" or n == 1
        endings = EMBEDDING if self.embedding else LAYER
        return {f"{self.stem}{end}": M.contiguous() for end, M in zip(endings, (A, B), strict=True)}


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A LoRA adapter: its config, the factors of each layer, and all other tensors."""

    config: Any
    pairs: dict[str, Pair]  # by path
    rest: dict[str, Tensor]  # by key on disk: magnitudes, biases, modules trained whole
    source: str = "the model"

    @classmethod
    def read(cls, adapter: str | os.PathLike[str], **hub: Any) -> AdapterFile:
        """The adapter in a folder or on the Hub.

        Raises:
            AdapterFileError: files that are missing, damaged or no LoRA's, factors that do not fit the config or are
                not finite; all faults in one message.
        """
        config = PeftConfig.from_pretrained(adapter, **hub)
        return cls.of(config, store.load_peft_weights(adapter, **hub), f"'{os.fspath(adapter)}'")

    @classmethod
    def of(cls, config: Any, tensors: Mapping[str, Tensor], source: str = "the model") -> AdapterFile:
        """The adapter of a config and tensors by their keys on disk; the same errors as `read`."""
        kind = type_name(config)
        if kind != "LORA":
            raise AdapterFileError(
                f"The adapter in {source} is {kind}, not LORA: its files alone do not say its delta. Give its base "
                "model, or convert it (`save_as_lora`)."
            )
        faults = [f"it is {name}, whose delta is not s·B·A" for f, name in FORMULAS.items() if getattr(config, f)]
        found: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if match := FACTOR.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = tensor
            else:
                rest[key] = tensor
                if ".lora_" in key and not BESIDE.search(key):
                    faults.append(f"'{key}' belongs to a formula that is not known here")
        halves = [f"{s}.{next(iter(f))}" for s, f in found.items() if len(f) != 2]
        faults += [f"'{key}' has no other factor beside it" for key in halves]
        if not found:
            faults.append("there is no pair of factors in it" if tensors else "it holds no tensor")
        pairs: dict[str, Pair] = {}
        for stem, (name, several) in _names(config, [s for s, f in found.items() if len(f) == 2], found).items():
            try:
                pairs[name] = _pair(config, name, stem, found[stem], several)
            except AdapterFileError as fault:
                faults.append(str(fault))
        if faults:
            shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise AdapterFileError(f"The adapter in {source} cannot be read as a LoRA: {shown}.")
        return cls(config, pairs, rest, source)

    def require_own_base(self) -> None:
        """Raise `AdapterFileError` where the factors mean something only beside the base that their start left."""
        start = self.config.init_lora_weights
        if isinstance(start, str) and start.startswith(STARTS):
            raise AdapterFileError(
                f"The adapter in {self.source} started by '{start}', which moved a part of the base into it: its "
                "factors are no update of the plain base, and another rank would not fit. Save it as a plain LoRA "
                "first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their keys on disk."""
        factors = {key: tensor for pair in self.pairs.values() for key, tensor in pair.tensors().items()}
        return {**factors, **self.rest}

    def with_pairs(self, pairs: Mapping[str, Pair]) -> AdapterFile:
        """The adapter with other factors, for the same layers or fewer, and a config that says so.

        Each keeps its scale, which the alpha of its layer follows: r is the most common rank, and `rank_pattern` and
        `alpha_pattern` name the layers that differ. Those that have one owner are grown to one rank.
        """
        most: dict[str, int] = {}
        for pair in pairs.values():
            most[pair.owner] = max(most.get(pair.owner, 0), pair.A.shape[1])
        pairs = {path: pair.grown(most[pair.owner]) for path, pair in pairs.items()}
        config = self.config.copy()
        config.use_rslora, config.init_lora_weights = False, True
        config.loftq_config, config.eva_config, config.corda_config, config.lora_ga_config = {}, None, None, None
        settings = [(pair.rank, _whole(pair.scale * pair.rank)) for pair in pairs.values()]
        config.r, config.lora_alpha = common(settings)
        alphas = {path: alpha for path, (_, alpha) in zip(pairs, settings, strict=True)}
        key = {path: _key(pair.owner, {**self.pairs, **pairs}) for path, pair in pairs.items()}
        config.rank_pattern = {key[p]: pair.rank for p, pair in pairs.items() if pair.rank != config.r}
        config.alpha_pattern = {key[p]: alpha for p, alpha in alphas.items() if alpha != config.lora_alpha}
        if len(pairs) < len(self.pairs):
            config.target_modules = set(pairs)
        own = {p: replace(pair, alpha=alphas[p]) for p, pair in pairs.items()}
        return AdapterFile(config, own, self.rest, self.source)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the adapter's files and its model card, all of them or none."""
        root = Path(folder)
        if root.is_file():
            raise AdapterFileError(f"'{root}' is a file: an adapter is written to a folder.")
        config = self.config.copy()
        config.inference_mode = True
        store.save(store.writers(root, config, self.tensors) | card.writers(root, config))
        return root


def common(values: Iterable[Any]) -> Any:
    """The most frequent of some values, the largest of those where there are several."""
    values = list(values)
    return max(values, key=lambda v: (values.count(v), v))


def _whole(alpha: float) -> float:
    """An alpha, without the decimals where it has none."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def _key(path: str, paths: Mapping[str, Any]) -> str:
    """The key of a pattern that fits one path only: the ending of a longer one needs the start marked."""
    longer = any(other.endswith(f".{path}") for other in paths)
    return f"^{re.escape(path)}" if longer else path


def _pair(config: Any, name: str, stem: str, factors: Mapping[str, Tensor], several: bool) -> Pair:
    """One layer's factors as matrices."""
    embedding = "lora_embedding_A" in factors
    try:
        A, B = (factors[f"lora_embedding_{x}" if embedding else f"lora_{x}"] for x in "AB")
    except KeyError:
        raise AdapterFileError(f"'{stem}' has one factor of an embedding and one of another layer") from None
    own, form = config.resolve(_owner(stem, name)), "one"
    r, kernel = own.r, tuple(A.shape[1:]) if A.ndim > 2 else ()
    rows, columns = (len(A), B.shape[1]) if min(A.ndim, B.ndim) > 1 else (0, 0)
    if kernel and columns and rows == r and rows % columns == 0 and rows != columns:
        form = "groups"
        A, B = A.flatten(1).unflatten(0, (rows // columns, -1)), B.flatten(1).unflatten(0, (rows // columns, -1))
    elif rows == columns == r:
        A, B = A.flatten(1)[None], B.flatten(1)[None]
    elif several and rows == columns and rows % r == 0:
        form = "stack"
        A, B = A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).movedim(-1, 0)
    else:
        raise AdapterFileError(f"'{name}' has rank {r} by the config, but an A {tuple(A.shape)} and B {tuple(B.shape)}")
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise AdapterFileError(f"'{name}' has a NaN or an infinity in its factors")
    return Pair(name, stem, A.detach(), B.detach(), own.scaling(), own.lora_alpha, embedding, form, kernel)


def _names(config: Any, stems: Sequence[str], found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[str, bool]]:
    """{stem: (path of the module or parameter, whether it is a parameter that a config names)}.

    The keys of parameters do not name them: several of one module lie one inside the other, in the module's own order,
    the first one innermost. Which is which is told by their ranks, else by the order that transformers' experts have.
    """
    modules: dict[str, list[str]] = {}
    for stem in sorted(stems, key=lambda s: -s.count("base_layer")):  # innermost first
        path = _path(stem)
        modules.setdefault(path, []).append(stem)
    named: dict[str, tuple[str, bool]] = {}
    for path, inside in modules.items():
        known = _parameters(config, path)
        if not known:
            named |= dict.fromkeys(inside, (path, False))
            continue
        for some in itertools.permutations(known, len(inside)):
            names = [f"{path}.{p}" for p in some]
            rows = [len(next(iter(found[stem].values()))) for stem in inside]
            counts = {n / config.resolve(name).r for n, name in zip(rows, names, strict=True)}
            if len(counts) == 1 and counts.pop().is_integer():
                named |= {stem: (name, True) for stem, name in zip(inside, names, strict=True)}
                break
        else:
            named |= {stem: (f"{path} ({i})", True) for i, stem in enumerate(inside)}
    return named


def _path(stem: str) -> str:
    """The path of a module, without the adapted layers that stand around it."""
    return ".".join(x for x in stem.removeprefix(PREFIX).split(".") if x != "base_layer")


def _owner(stem: str, path: str) -> str:
    return _path(stem.rpartition(".base_layer.")[0]) or path


def _parameters(config: Any, path: str) -> list[str]:
    """The parameters of a module that a config names, in the order modules have them."""
    found: list[str] = []
    if matches(config.target_modules, path) is not None:  # the module itself is what is adapted
        return found
    for entry in config.target_parameters or ():
        module, _, name = str(entry).rpartition(".")
        if not module or path == module or path.endswith("." + module):
            found.append(name)
    order = {name: 2 * i for i, name in enumerate(EXPERTS)}
    return sorted(dict.fromkeys(found), key=lambda name: order.get(name, 1))
