"""Trainable tokens: some rows of an embedding are trained.   W'[:, t] = delta_t for the chosen tokens t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig, PeftType, help_field
from trimtab.core.method import INPUT_EMBEDDING, Call, Leaf, Leaves, Method
from trimtab.core.site import EmbeddingSite, Site


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Which tokens of which embedding are trained."""

    token_indices: list[int] = help_field("The indices of the tokens to train.", factory=list)
    target_modules: list[str] | str | None = help_field("The embedding; the model's input embedding when None.", None)
    init_weights: bool = help_field("Start from the tokens' own rows; else random.", True)

    # What other configs for layers have and this one's file does not.
    exclude_modules: ClassVar[None] = None
    modules_to_save: ClassVar[None] = None
    layers_to_transform: ClassVar[None] = None
    layers_pattern: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS


class TrainableTokens(Method):
    """Rows (tokens, dim) that stand in for the embedding's own, and for the tied head's."""

    when = "new or special tokens: their embeddings alone"
    example = {"token_indices": [0]}
    config, prefix, listed = TrainableTokensConfig, "trainable_tokens_", "token_adapter"
    kinds = fused = frozenset({"embedding", "linear"})
    tied = frozenset({"embedding"})  # a head that is named goes alone
    echoes = partial = True
    targets = {"*": INPUT_EMBEDDING}
    views = ("token_indices", "trainable_tokens_original")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        dim = site.fan_out if site.kind == "embedding" else site.fan_in
        return {"trainable_tokens_delta": Leaf((len(config.token_indices), dim))}  # (tokens, dim)

    def setup(self, config: Any) -> None:
        self.token_indices = list(config.token_indices)
        self.tokens = torch.tensor(self.token_indices, dtype=torch.long)
        self.vocabulary = self.site.fan_in if self.site.kind == "embedding" else self.site.fan_out

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.trainable_tokens_delta.copy_(self.present())
        else:
            self.trainable_tokens_delta.normal_()

    def present(self) -> Tensor:
        """The tokens' own rows (tokens, dim)."""
        W = self.site.matrix()
        return (W.mT if self.site.kind == "embedding" else W)[self.tokens.to(W.device)]

    @property
    def trainable_tokens_original(self) -> Tensor:
        """The base's rows (tokens, dim)."""
        return self.present()

    def weight(self, W: Tensor) -> Tensor:
        tokens, new = self.tokens.to(W.device), self.trainable_tokens_delta.to(W.dtype)
        return W.index_copy(1, tokens, new.T) if self.site.kind == "embedding" else W.index_copy(0, tokens, new)

    def bias(self, b: Tensor | None) -> Tensor | None:
        own = self.site.bias()
        if b is None or self.site.kind == "embedding":
            return b
        tokens = self.tokens.to(b.device)  # their logits are the rows' alone, whatever adapters below have added
        return b.index_copy(0, tokens, (torch.zeros_like(b) if own is None else own.to(b.dtype))[tokens])

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        tokens, new, site = self.tokens.to(y.device), self.trainable_tokens_delta.to(y.dtype), self.site
        if isinstance(site, EmbeddingSite):
            count = torch.arange(len(tokens), device=y.device)
            place = torch.full((self.vocabulary,), -1, device=y.device).index_copy(0, tokens, count)[x]
            rows = site.scaled(torch.nn.functional.embedding(place.clamp_min(0), new))
            return torch.where((place >= 0)[..., None], rows, y)
        logits = site.apply(x, new.to(x.dtype)).to(y.dtype)
        b = site.bias()
        return y.index_copy(-1, tokens, logits if b is None else logits + b[tokens])
