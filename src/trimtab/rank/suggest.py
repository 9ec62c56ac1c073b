"""Which rank a task asks for, before training: by its size in a second, by its gradients in a minute.

The size. LoRA does as well as full fine-tuning while its parameters are at least the tokens it is trained on, and
falls behind where they are fewer (Schulman et al. 2025, "LoRA Without Regret", https://thinkingmachines.ai/blog/lora/,
and the LoRA primer of Tinker's documentation). More rank than that buys nothing: the curve of quality is flat there.

The gradients. What a step of full fine-tuning would change first is G = dL/dW, summed over some rows. A LoRA of rank r
can follow its r strongest directions. G is never formed: its products with random matrices from both sides are summed
batch by batch (Tropp et al. 2016, https://arxiv.org/abs/1609.00048, algorithm 4), and what those miss is estimated.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import require_rank
from trimtab.errors import ConfigError, NoMatchingPeftModuleError
from trimtab.rank.adapter_file import FACTOR, common

ALPHA = 32  # the one that the learning rates below are for: with s = alpha / r they hardly depend on r
# What Tinker's cookbook found best for LoRA over its models (tulu3, 780 steps of 128 rows): up to 8 B, above.
RATES = (1e-3, 3e-4)
LARGE = 8.5e9


@dataclass(frozen=True)
class TargetSet:
    """Layers one may adapt, and what a rank of all of them costs."""

    name: str
    modules: tuple[str, ...]  # the last names of the layers
    layers: int
    parameters: int  # of a LoRA of rank 1

    def rank(self, tokens: int) -> int:
        """The least rank whose parameters are as many as the tokens."""
        return max(1, -(-tokens // self.parameters))


@dataclass(frozen=True)
class Suggestion:
    """What the size of a task says.

    Attributes:
        tokens: how many are trained on, each counted once, however often they are seen.
        sets: the layers one may adapt; the first one is what is advised.
        rank: the least power of two that suffices for it.
        flat: whether rank 1 suffices already, so that more should change nothing.
        learning_rate: where to start the search for one; a factor of 3 either way is worth a try.
    """

    tokens: int
    sets: list[TargetSet]
    rank: int
    alpha: int
    learning_rate: float
    flat: bool


@dataclass(frozen=True)
class RankEstimate:
    """What one layer's gradient says.

    Attributes:
        shape: of W, (out, in).
        norm: of the gradient, Frobenius.
        values: its largest singular values.
        rank: how many hold the share of its energy that was asked for; the size of the sketch where more would.
        capped: whether more would.
    """

    path: str
    shape: tuple[int, int]
    norm: float
    values: tuple[float, ...]
    rank: int
    capped: bool


def suggest_rank(model: nn.Module, tokens: int) -> Suggestion:
    """The rank that a number of trained tokens asks for, by the parameters it gives.

    Args:
        model: the base model; one without storage (`torch.device("meta")`) will do. It stays as it is.
        tokens: how many tokens are trained on: those of the answers, not of the prompts.
    """
    if tokens < 1:
        raise ConfigError(f"There must be tokens to train on, and there are {tokens}.")
    sizes = _sizes(model, "all-linear")
    attention = [p for p in sizes if any("attn" in s or "attention" in s for s in p.lower().split("."))]
    sets = [_set("all-linear", sizes, sizes)]
    if attention and len(attention) < len(sizes):
        sets += [_set("mlp", sizes, [p for p in sizes if p not in attention]), _set("attention", sizes, attention)]
    try:
        default = _sizes(model, None)
        sets.append(_set("default", default, default))
    except (ConfigError, NoMatchingPeftModuleError):  # transformers' newest models have none
        pass
    least = sets[0].rank(tokens)
    rate = RATES[sum(p.numel() for p in model.parameters()) > LARGE]
    return Suggestion(tokens, sets, 1 << math.ceil(math.log2(least)), ALPHA, rate, flat=least == 1)


def estimate_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    energy: float = 0.9,
    target_modules: Any = "all-linear",
    sketch: int = 32,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> list[RankEstimate]:
    """The rank of each layer's gradient over some batches: one forward and backward pass each, no full-size matrix.

    Args:
        model: the base model; frozen or quantised weights will do. It stays as it is.
        batches: of rows to train on; a few hundred rows are plenty.
        energy: the share of the gradient's energy (the sum of its squared singular values) to be held.
        target_modules: which layers, as a LoraConfig has it.
        sketch: the largest rank that can be told.
        loss: (model, batch) -> loss to be summed; by default `model(**batch).loss`.

    Raises:
        ConfigError: no batch, no layer, or a loss or a gradient that is not finite.
    """
    require_rank(sketch, "sketch")
    if not 0 < energy <= 1:
        raise ConfigError(f"A share of the energy lies above 0 and at most at 1, not at {energy}.")
    paths = [p for p in _sizes(model, target_modules) if _linear(model, p)]
    if not paths:
        raise ConfigError(f"`target_modules={target_modules!r}` names no linear layer of this model.")
    draws = _Draws(sketch, seed)
    sketches: dict[str, _Sketch] = {}
    count = 0
    with _watched(model, paths, lambda path, dy, x: sketches.setdefault(path, _Sketch(draws)).add(dy, x)):
        for batch in batches:
            value = loss(model, batch) if loss is not None else model(**batch).loss
            if not torch.isfinite(value):
                raise ConfigError(f"The loss of batch {count + 1} is {float(value)}: there is no gradient to look at.")
            value.backward()
            count += 1
    if not count or not sketches:
        raise ConfigError("There is no batch whose loss depends on these layers: nothing can be estimated.")
    return [sketches[path].estimate(path, energy) for path in paths if path in sketches]


def config_of(estimates: Iterable[RankEstimate]) -> dict[str, Any]:
    """`r` and `rank_pattern` of a LoraConfig with these ranks."""
    ranks = {e.path: e.rank for e in estimates}
    r = common(ranks.values())
    return {"r": r, "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r}}


# ---------------------------------------------------------------------- sizes
def layer_shapes(model: nn.Module, target_modules: Any) -> dict[str, tuple[int, int]]:
    """{path of a layer that a LoRA changes: (out, in) of its W as a matrix}."""
    from trimtab.methods import config_class
    from trimtab.shell.tasks import get_peft_model

    config = config_class("LORA")(r=1, target_modules=target_modules)  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a first adapter says about this model
        graft = get_peft_model(skeleton(model), config).graft
    halves: dict[str, dict[str, int]] = {}
    for slot in graft.slots(graft.require("default")):
        if match := FACTOR.fullmatch(slot.disk):
            halves.setdefault(match[1], {})[match[2][-1]] = slot.get().numel()
    return {path: (sizes["B"], sizes["A"]) for path, sizes in halves.items()}


def _sizes(model: nn.Module, target_modules: Any) -> dict[str, int]:
    """{path of a layer: the parameters that a LoRA of rank 1 has there}."""
    return {path: sum(shape) for path, shape in layer_shapes(model, target_modules).items()}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without storage: its layers, names and shapes."""
    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, empty)


def _set(name: str, sizes: dict[str, int], paths: Iterable[str]) -> TargetSet:
    paths = list(paths)
    modules = tuple(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    return TargetSet(name, modules, len(paths), sum(sizes[p] for p in paths))


# ---------------------------------------------------------------------- gradients
class _Draws:
    """The random matrices, one for each width: layers of one width share it."""

    def __init__(self, k: int, seed: int) -> None:
        self.k, self.seed = k, seed
        self.made: dict[tuple[int, int], Tensor] = {}

    def matrix(self, n: int, k: int, device: torch.device) -> Tensor:
        """(n, k) of standard normal numbers; the identity where k would not be less than n."""
        if (n, k) not in self.made:
            draw = torch.Generator().manual_seed(self.seed + n + k)
            self.made[n, k] = torch.eye(n) if k >= n else torch.randn(n, k, generator=draw)
        return self.made[n, k].to(device)


class _Sketch:
    """G = Σ dy'x (out, in) by its products with random matrices from both sides."""

    def __init__(self, draws: _Draws) -> None:
        self.draws = draws
        self.right, self.left = torch.zeros(()), torch.zeros(())

    def add(self, dy: Tensor, x: Tensor) -> None:
        """One batch: dy (tokens, out), x (tokens, in)."""
        self.shape, k = (dy.shape[-1], x.shape[-1]), self.draws.k
        dy, x = dy.reshape(-1, dy.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        self.omega = self.draws.matrix(x.shape[1], k, x.device)  # (in, k)
        self.psi = self.draws.matrix(dy.shape[1], 4 * k + 2, x.device)  # (out, l), l = 4k + 2
        self.right = self.right.to(x.device) + dy.mT @ (x @ self.omega)  # G·omega (out, k)
        self.left = self.left.to(x.device) + (dy @ self.psi).mT @ x  # psi'·G (l, in)

    def estimate(self, path: str, energy: float) -> RankEstimate:
        """The spectrum of what was added."""
        if not (torch.isfinite(self.right).all() and torch.isfinite(self.left).all()):
            raise ConfigError(f"The gradient of '{path}' is not finite.")
        right, left, psi = self.right.double(), self.left.double(), self.psi.double()
        Q = torch.linalg.qr(right).Q  # (out, k), of the range of G
        seen = psi.mT @ Q  # (l, k)
        X = torch.linalg.lstsq(seen, left).solution  # Q'G and noise from what Q leaves out
        energies, rest = torch.linalg.svdvals(X).square(), float((left - seen @ X).square().sum())
        l, k = seen.shape
        if l < self.shape[0]:  # a Gaussian psi: E[rest] = (l - k)·||G - QQ'G||², E[noise] = that norm² / (l - k - 1)·I
            rest /= l - k
            energies = (energies - rest / (l - k - 1)).clamp_min(0)
        sums, total = energies.cumsum(0), float(energies.sum()) + rest
        rank = int((sums < energy * total * (1 - 1e-6)).sum()) + 1 if total else 1
        capped = rank > len(sums)
        return RankEstimate(path, self.shape, math.sqrt(total), tuple(energies.sqrt().tolist()), rank - capped, capped)


@contextmanager
def _watched(model: nn.Module, paths: list[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block a backward pass hands `see` each layer's (path, gradient of its output, input); weights get
    none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}

    def hook(path: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda dy: see(path, dy, x))

        return forward

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    embeddings: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    if embeddings is not None:  # gradients must flow although nothing before the layers is trained
        handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        model.eval()
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def _linear(model: nn.Module, path: str) -> bool:
    from trimtab.core.site import site_class

    try:
        kind = site_class(model.get_submodule(path))
    except AttributeError:  # a parameter of a module
        return False
    return kind is not None and kind.kind == "linear" and not kind.reads
