"""The shared halves of formulas. A family gives helpers that hooks call; it overrides no hook itself."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.combining import Recipe, split, split_product
from trimtab.core.fields import default_of
from trimtab.core.kernels import delta_linear, grouped
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError, PeftWarning


def wide(M: Tensor) -> Tensor:
    """A factor in fp32 at least, for products that end in a weight."""
    return M if M.dtype == torch.float64 else M.float()


def skew(v: Tensor, n: int) -> Tensor:
    """The skew-symmetric matrices Q (..., n, n) of their entries above the diagonal v (..., n (n - 1) / 2)."""
    rows, columns = torch.triu_indices(n, n, 1, device=v.device)
    upper = v.new_zeros(*v.shape[:-1], n * n).index_copy(-1, rows * n + columns, v).unflatten(-1, (n, n))
    return upper - upper.mT


def cayley(Q: Tensor, terms: int | None = None) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of skew-symmetric matrices; with `terms` the inverse by so many of I + Q + Q² + ..."""
    I = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if terms is None:
        return torch.linalg.solve(I - Q, I + Q, left=False)
    if terms <= 2:
        return I + 2 * Q if terms == 2 else I.expand(Q.shape)
    # Of (I + Q)(I + Q + ... + Q^m), m as PEFT has it, two powers a product: I + 2 Q + Q² (2 I + 2 Q + Q² (...)).
    m, first, P = max(2, terms - 2), I + 2 * Q, Q @ Q
    R = first + I + P if m % 2 else 2 * I + Q
    for _ in range(m // 2 - 1):
        R = first + I + P @ R
    return first + P @ R


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """t ×₁ aᵀ ×₂ bᵀ (out, in, *kernel) of a core t (r, r, *kernel), a (r, out) and b (r, in)."""
    return torch.einsum("ij...,ik,jn->kn...", t, a, b)


def no_input(site: Site) -> None:
    """Speak up about dropout where a method sees no input to drop: PEFT refuses it for parameters, else ignores it."""
    message = f"`lora_dropout` cannot act on '{site.name}', whose input only its own module sees"
    if site.kind == "parameter":
        raise ConfigError(
            f"{message} (lora.ParamWrapper does not work with lora_dropout != 0): set it to 0 to train this adapter "
            "(for inference it loads as it is)."
        )
    warnings.warn(f"{message}: it is trained without.", PeftWarning, stacklevel=2)


def names_at(site: Site) -> tuple[str, str]:
    """What the pair is called at a site."""
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")


def one_projection(config: Any, others: Sequence[Any], key_of: str, saved_of: str) -> None:
    """Raise unless all adapters draw their projections from one key, and all or none save them.

    Args:
        key_of: what the method is called in the error about the key; `saved_of`: in that about saving.
    """
    for other in others:
        if other.projection_prng_key != config.projection_prng_key:
            raise ConfigError(
                f"{key_of} PRNG initialisation key must be the same for all adapters. Got "
                f"{config.projection_prng_key=} but previous config had {other.projection_prng_key}."
            )
        if other.save_projection != config.save_projection:
            raise ConfigError(
                f"{saved_of} projection weights must be saved for all adapters or none, but got multiple different "
                f"values: {sorted({other.save_projection, config.save_projection})}"
            )


def require_places(site: Site, n: int, name: str) -> None:
    """Raise unless `n`, a field of that name, is a number of entries that the matrix of a site has."""
    require_rank(n, name)
    size = site.fan_in * site.fan_out
    if n > size:
        raise ConfigError(
            f"`{name}` should be less than or equal to the product of the input and output dimensions but the "
            f"value passed is {n} and the product is {size} at '{site.name}'"
        )


def skipped(method: Method, call: Call, p: float) -> bool:
    """Whether, in training, the adapter sits this forward out at its layer: with probability `p`."""
    return bool(p and method.training and torch.rand(1, generator=call.generator(method, "module")) < p)


def kept_rows(method: Method, call: Call, p: float, rescale: bool) -> Tensor | None:
    """Which outputs (out,) see the update in training, each with probability 1 - p, scaled up for those that do not."""
    if not p or not method.training:
        return None
    kept = (torch.rand(method.site.fan_out, generator=call.generator(method, "rank")) > p).float()
    kept = kept / kept.mean().clamp_min(1 / len(kept)) if rescale else kept
    return kept.to(method.site.device)


def drawn_places(site: Site, n: int, seed: int | None) -> Tensor:
    """Places (n,) of a matrix (out, in), counted row by row: drawn from a seed, as PEFT draws them."""
    if seed is None:
        raise ConfigError(
            "`random_loc_seed` must be a number: the places are not in the file, but drawn again from it."
        )
    return torch.randperm(site.fan_out * site.fan_in, generator=torch.Generator().manual_seed(seed))[:n]


Gated = Callable[[Sequence[Sequence[Any]]], tuple[list[list[grouped.Update]], Tensor, Tensor | None]]


class LowRank(Method):
    """dW = s·B·A with A (r, in), B (out, r), under LoRA's names (an embedding's pair has names of its own)."""

    views = ("r", "lora_alpha", "scaling", "dropout")
    settings = ("lora_dropout", "use_dora", "use_rslora", "lora_bias")
    elsewhere = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    @staticmethod
    def pair(site: Site, r: int, biased: bool = False) -> Leaves:
        """The pair, in the shapes the kind of layer keeps it; `biased`: B has a bias, too."""
        require_rank(r)
        A, B = names_at(site)
        suffix = "" if site.kind == "embedding" else ".weight"
        leaves = {
            A + suffix: Leaf(site.down(r)),  # (r, in)
            B + suffix: Leaf(site.up(r)),  # (out, r)
        }
        if biased:
            if site.kind in ("embedding", "parameter"):
                raise ConfigError(f"lora_bias=True is not supported for an {site.kind}: '{site.name}' has no bias.")
            leaves["lora_B.bias"] = Leaf((site.fan_out,))  # (out,)
        return leaves

    def scale(self, r: int, alpha: float, scaling: float, dropout: float) -> None:
        """Note rank and scale."""
        require_rank(r)
        self.r, self.lora_alpha, self.scaling, self.dropout = r, alpha, scaling, dropout
        self.unit = scaling  # what `set_scale` multiplies
        if dropout and not self.site.fused and not self.options.inference_mode:
            no_input(self.site)
        self.names = names_at(self.site)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) as the layer holds them now."""
        return getattr(self, self.names[0]), getattr(self, self.names[1])

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """(A, B) as the matrices (..., r, in) and (..., out, r) they are; views, where the site can."""
        A, B = self.factors
        return self.site.lower(A), self.site.upper(B)

    @property
    def shift(self) -> Tensor | None:
        """What B's bias adds to the output (out,), or None where it has none."""
        return self.scaling * self.lora_B_bias if "lora_B_bias" in self.places else None

    def lifted(self, b: Tensor | None) -> Tensor | None:
        """A layer's bias with B's added."""
        extra = self.shift
        return b if extra is None else extra if b is None else b + extra

    def put(self, A: Tensor, B: Tensor) -> None:
        """Store a pair of matrices (..., r, in) and (..., out, r) as the kind of layer keeps them."""
        for stored, view, M in zip(self.factors, self.matrices, (A, B), strict=True):
            if view.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
                raise ConfigError(f"'{self.site.name}' cannot keep any B (out, r): choose another `init_lora_weights`.")
            view.copy_(M)

    def delta(self) -> Tensor:
        """s·B·A (..., out, in), formed in fp32 whatever the factors' number format."""
        A, B = self.matrices
        return self.scaling * (wide(B) @ wide(A))

    def plus_delta(self, W: Tensor) -> Tensor:
        """W + s·B·A (..., out, in); one pass over W, which bounds a merge, where formats allow it."""
        A, B = (wide(M) for M in self.matrices)
        if W.ndim == 2 and A.dtype == B.dtype == W.dtype:
            return torch.addmm(W, B, A, alpha=self.scaling)
        return W + self.delta()

    @staticmethod
    def combined(methods: Sequence[Any], weights: Sequence[float], recipe: Recipe, rank: int) -> dict[str, Tensor]:
        """The tensors, by alias, of one pair of `rank` and scale 1 for several at a layer; biases as deltas do."""
        As, Bs = zip(*[[wide(M.detach()).flatten(1) for M in m.factors] for m in methods], strict=True)
        scaled = [w * m.scaling for w, m in zip(weights, methods, strict=True)]
        site, (name_A, name_B) = methods[0].site, methods[0].names
        if recipe.form == "factors":
            roots = [abs(s) ** 0.5 for s in scaled]
            A = recipe.merge(As, [-d if s < 0 else d for d, s in zip(roots, scaled, strict=True)])
            B = recipe.merge(Bs, roots)
        else:
            A, B = torch.cat([s * A for s, A in zip(scaled, As, strict=True)]), torch.cat(Bs, 1)
        if recipe.form == "delta":
            # The clamp depends on the singular vectors' signs: only a dense SVD picks them as PEFT does.
            if recipe.type == "svd" and recipe.clamp is None and len(A) < min(site.fan_out, site.fan_in):
                A, B = split_product(A, B, rank, recipe.driver)
            else:
                D = recipe.merge([wide(m.delta().detach()) for m in methods], weights)
                A, B = split(D, rank, recipe.clamp, recipe.driver)
            A, B = F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - B.shape[1]))
        tensors = {name_A: A.reshape(site.down(rank)), name_B: B.reshape(site.up(rank))}
        shifts = [(m.shift, w) for m, w in zip(methods, weights, strict=True) if m.shift is not None]
        if shifts:
            tensors["lora_B_bias"] = recipe.merge([wide(shift.detach()) for shift, _ in shifts], [w for _, w in shifts])
        return tensors

    @staticmethod
    def settle(cls: Any, config: Any, configs: Sequence[Any], ranks: Mapping[str, int]) -> None:
        """Give the config of a combination its ranks, such that each scale is 1; it is a plain pair's."""
        for field in dataclasses.fields(config):
            if field.name in cls.example:  # what chooses a variant
                setattr(config, field.name, default_of(field))
        config.r = config.lora_alpha = max(ranks.values(), default=config.r)
        # "^" keeps a path from fitting the end of a longer one.
        config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        config.use_rslora, config.lora_bias = False, any(c.lora_bias for c in configs)
        if cls.mutates(config):
            config.init_lora_weights = True

    @staticmethod
    def added(
        stacks: Sequence[Sequence[Any]],
        y: Tensor,
        x: Tensor,
        cut: Any,
        gated: Gated | None = None,
        inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """y with every row's updates added, by two batched products for all rows; None where these do not apply.

        Args:
            stacks: the methods of each group of rows, of one linear site.
            cut: its `rows` tell each row's group; what is stacked is kept in its `banks` while no gradient is wanted.
            gated: of methods that scale the layer's output as well: (the updates, what each group's output is scaled
                by, what is added to it).
            inputs: x -> what the updates see of it, where that is not x itself.
        """
        methods = [m for stack in stacks for m in stack]
        if methods[0].site.mesh is not None:
            return None
        parts = tuple(holder[key] for m in methods for holder, key in m.places.values())
        name, fixed = methods[0].site.name, not torch.is_grad_enabled()
        stamp = grouped.stamp_of(parts, [m.scaling for m in methods]) if fixed else None
        bank: grouped.Bank | None = cut.banks.get(name) if fixed else None
        if bank is not None and not (bank.source is stacks and bank.stamp == stamp):
            bank = None
        if not grouped.applies(y, x, len(cut.owners), parts if bank is None else (bank.A,)):
            return None
        if bank is None:
            gate = shift = None
            owners = cut.owners
            if gated is None:
                updates = [[(*m.matrices, m.scaling) for m in stack] for stack in stacks]
                owners = cut.pieces
            else:
                updates, *vectors = gated(stacks)
                gate, shift = (None if v is None else v.index_select(0, cut.rows) for v in vectors)
            bank = grouped.Bank(stacks, parts, stamp, *grouped.stacked(updates, owners), gate, shift)
            if fixed:
                cut.banks[name] = bank
        return grouped.add_rows(y, x if inputs is None else inputs(x), bank)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The update of an output up to its last product: (h, B) with s·B·A·x = B·h.

        Factors in fp32 beside a half-precision input stay so where the site can multiply the two; else the skinny
        factors take the input's number format, never the input theirs. Indices leave them as they are.
        """
        A, B = self.matrices
        if x.is_floating_point() and not (A.dtype == torch.float32 and self.site.widens(x)):
            A, B = A.to(x.dtype), B.to(x.dtype)
        return self.site.apply(x, A) * self.scaling, B


class Delta(Method):
    """dW of full size, formed from few tensors; formed anew for the backward pass instead of being saved, so that
    training needs no copy of the weights.

    A method whose whole formula is `form` and `sources` takes `summed`, `joined` and `added` for its hooks `weight`,
    `through` and `after`.
    """

    form: Callable[..., Tensor]  # dW (out, in), in fp32 at least, of `sources`; a function of its arguments alone
    onto: Callable[..., Tensor] | None = None  # W + dW of a W and `sources`, where that costs less than dW by itself
    dropped: str = ""  # the field of its dropout on the input

    @property
    def sources(self) -> Sequence[Tensor]:
        """The tensors that `form` takes."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """The probability with which entries of its input are dropped in training."""
        return float(getattr(self.options, self.dropped)) if self.dropped else 0.0

    def summed(self, W: Tensor) -> Tensor:
        """W + dW."""
        return W + self.form(*self.sources) if self.onto is None else self.onto(W, *self.sources)

    def joined(self, x: Tensor, call: Call) -> Tensor | None:
        """The layer with its change in one step, or None where that does not apply."""
        return None if self.training and self.rate else self.with_delta(x, self.form, *self.sources, onto=self.onto)

    def added(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """The layer's output with dW·x added."""
        return self.plus_delta(y, call.drop(self, x, self.rate), self.form, *self.sources)

    def plus_delta(self, y: Tensor, x: Tensor, form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """y + dW·x with dW = form(*tensors) (out, in). `form` must be a function of its arguments alone."""
        if self.site.kind != "linear":
            M = form(*tensors)
            return y + self.site.apply(x, M.to(x.dtype) if x.is_floating_point() else M)
        return y + delta_linear(x, None, None, form, *tensors)

    def with_delta(
        self, x: Tensor, form: Callable[..., Tensor], *tensors: Tensor, onto: Callable[..., Tensor] | None = None
    ) -> Tensor | None:
        """The layer's own product and dW·x in one step, or None where the layer has no plain weight."""
        plain = self.site.plain()
        return None if plain is None else delta_linear(x, *plain, form, *tensors, onto=onto)


class Sparse(Delta):
    """A change of which few entries are not zero: added to a copy of W, without a second matrix of its size."""

    entries: Callable[..., tuple[Tensor, Tensor]]  # their places (n,), counted row by row, and values (n,)

    def form(self, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        """dW (out, in), in fp32 at least."""
        return self.onto(wide(tensors[0]).new_zeros(self.site.fan_out, self.site.fan_in), *tensors)

    def onto(self, W: Tensor, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        """W + dW (out, in)."""
        places, values = self.entries(*tensors)
        dtype = torch.promote_types(W.dtype, values.dtype)
        return W.to(dtype).flatten().scatter_add(0, places, values.to(dtype)).view(W.shape)
