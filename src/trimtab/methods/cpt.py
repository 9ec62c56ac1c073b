"""CPT (Blau et al. 2024, https://arxiv.org/abs/2410.17222, section 3).   Pr(Y | [C + δ; X]),   |δ_i| <= ε_i.

C are the embeddings of a few examples, their types 1, 2, 3, 4 (+ 4 for each further example): what comes before an
input, an input, what comes before a label, a label. Labels stay as they are, and are trained on beside the call's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import PeftType, PromptLearningConfig, help_field
from trimtab.core.method import Call
from trimtab.core.model_method import PromptMethod
from trimtab.core.report import warn
from trimtab.errors import ConfigError

LEAST, WIDTH = 1e-10, 2048  # the radius of what stays, and the width of embeddings that radii are meant for


@dataclass
class CPTConfig(PromptLearningConfig):
    """The configuration of a prompt that starts as examples and stays near them."""

    cpt_token_ids: list[int] | None = help_field("The tokens of the examples.", None)
    cpt_mask: list[int] | None = help_field("Without effect: every token of the examples is attended.", None)
    cpt_tokens_type_mask: list[int] | None = help_field("The type of each token: 1 to 4, then 5 to 8 ...", None)
    opt_weighted_loss_type: Literal["none", "decay"] | None = help_field("Weigh labels: none or decay.", "none")
    opt_loss_decay_factor: float | None = help_field("The weight of a label for each later label.", 1.0)
    opt_projection_epsilon: float | None = help_field("How far inputs may move.", 0.1)
    opt_projection_format_epsilon: float | None = help_field("How far what comes before them may.", 0.1)
    tokenizer_name_or_path: str | None = help_field("The tokenizer the ids are of.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        if self.task_type != "CAUSAL_LM":
            raise ConfigError("CPTConfig only supports task_type = CAUSAL_LM.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * count if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        if 0 in self.cpt_mask:
            warn("`cpt_mask` has no effect: every token of `cpt_token_ids` is attended. Leave out those that are not.")


class CPT(PromptMethod):
    """C and δ (tokens, dim)."""

    when = "few-shot prompts that training refines"
    example = {"cpt_token_ids": [0] * 20}
    config, extras, frozen = CPTConfig, ("input_type_mask",), ("embedding.weight",)

    def build(self, config: Any) -> None:
        self.options, count = config, config.num_virtual_tokens
        self.embedding = nn.Embedding(count, config.token_dim)  # (tokens, dim)
        self.delta_embedding = nn.Embedding(count, config.token_dim)  # (tokens, dim)

    def reset(self, config: Any, base: Any) -> None:
        table = base.get_input_embeddings()
        C = table(torch.tensor(config.cpt_token_ids, device=table.weight.device))
        self.embedding.weight.data.copy_(C.detach())
        self.delta_embedding.weight.data.zero_()

    def prompt(self, call: Call) -> Tensor:
        delta, moves = self.delta_embedding.weight, self._types() % 4 != 0
        with torch.no_grad():  # a step that left the ball goes back to its surface
            limit, norm = self._limits().to(delta), delta.norm(dim=1)
            # What is there but for rounding stays: saving asks for the prompt, too, and must change nothing.
            delta.mul_(torch.where(norm > limit * (1 + 1e-6), limit / norm, 1.0)[:, None])
        return self.embedding.weight + torch.where(moves[:, None], delta, delta.detach())

    def _types(self) -> Tensor:
        return torch.tensor(self.options.cpt_tokens_type_mask, device=self.delta_embedding.weight.device)

    def _limits(self) -> Tensor:
        """How far each token may move."""
        own, form = self.options.opt_projection_epsilon, self.options.opt_projection_format_epsilon
        table = torch.tensor([LEAST, form, own, form], device=self.delta_embedding.weight.device)
        limits = table[self._types() % 4]
        scale = (self.options.token_dim / WIDTH) ** 0.5
        return torch.where(limits > LEAST, limits * scale, limits)

    def restore(self, name: str, value: Tensor) -> None:
        """Training goes on inside the balls around the examples' own embeddings, where the file's prompt is in them."""
        delta = value.to(self.embedding.weight) - self.embedding.weight.data
        inside = bool((delta.norm(dim=1) <= self._limits().to(delta) * (1 + 1e-3)).all())
        if self.options.inference_mode or not inside:
            self.embedding.weight.data.copy_(value)
            delta = torch.zeros_like(delta)
        self.delta_embedding.weight.data.copy_(delta)

    def around(self, forward: Callable[..., Any], inputs: dict[str, Any], call: Call) -> Any:
        labels = inputs.pop("labels", None)  # those of the examples are -100 as yet
        outputs = forward(**inputs)
        if labels is not None:
            named = not isinstance(outputs, tuple)
            logits = outputs.logits if named else outputs[0]
            loss = self._loss(logits, labels, call.extras.get("input_type_mask"))
            outputs = type(outputs)(**{**outputs, "loss": loss}) if named else (loss, *outputs)
        return outputs

    def _loss(self, logits: Tensor, labels: Tensor, own: Tensor | None) -> Tensor:
        """Mean over the label tokens of a batch, each label weighed by how many come after it in its row."""
        types, count = self._types().to(labels.device), self.options.num_virtual_tokens
        ids = torch.tensor(self.options.cpt_token_ids, device=labels.device)
        labels = torch.cat([ids.expand(len(labels), -1), labels[:, count:]], 1)
        own = 4 * (labels[:, count:] != -100).long() if own is None else own.to(labels.device)
        after = (types.max() + 3) // 4 * 4  # the call's own example is the next one
        types = torch.cat([types.expand(len(labels), -1), torch.where(own > 0, own + after, own)], 1)[:, 1:]
        chosen = (types > 0) & (types % 4 == 0)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        if self.options.opt_weighted_loss_type == "decay":
            steps = torch.arange(4, int(types.max()) + 5, 4, device=types.device)
            there = ((types[:, :, None] == steps) & chosen[:, :, None]).any(1)  # (rows, labels)
            later = ((steps > types[:, :, None]) & there[:, None]).sum(-1)
            losses = losses * self.options.opt_loss_decay_factor**later
        return (losses * chosen).sum() / chosen.sum().clamp_min(1)
