"""A small model beside a base model, taken out of it: a model of transformers by itself.

Imported when it is asked for, as transformers is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from trimtab.core.model_method import last_tokens


class DetachedShadowModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """head(projection(backbone(x))): what a small model beside another says by itself.

    Args:
        backbone: a model without a head.
        projection: to the width of the head, where the backbone has another.
        head: to the vocabulary, or to the labels of a classifier.
        is_classification: the head is a classifier's.
        input_embeddings: read in the place of the backbone's; they are no part of the model or its files.
    """

    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: Any,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone.config)
        self.backbone, self.is_classification = backbone, is_classification
        self.__dict__["outside"] = input_embeddings  # past nn.Module's setattr: it is no child
        if projection is not None:
            self.shadow_hidden_projection = projection
        if head is not None:
            self.head = head
        self.loss_type = "ForSequenceClassification" if is_classification else "ForCausalLM"
        if self.can_generate():
            self.generation_config = GenerationConfig.from_model_config(self.config)
        whose = next((n for n, p in backbone.named_parameters() if p is getattr(head, "weight", None)), None)
        if whose is not None:
            self._tied_weights_keys = {"head.weight": f"backbone.{whose}"}
        self.post_init()
        self.train(backbone.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: its parts come with their weights."""

    def can_generate(self) -> bool:
        """Whether it has a head that says tokens."""
        return hasattr(self, "head") and not self.is_classification

    def get_input_embeddings(self) -> Any:
        """The embeddings it reads."""
        return self.__dict__["outside"] or self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Read others."""
        if self.__dict__["outside"] is not None:
            self.__dict__["outside"] = value
        else:
            self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The head, or None."""
        return getattr(self, "head", None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (rows, tokens, vocabulary) and a cache, or of a classifier (rows, labels); a loss with labels.

        Without a head, the last hidden states (rows, tokens, dim).
        """
        kwargs.pop("return_dict", None)
        read = self.get_input_embeddings()
        x = kwargs.pop("inputs_embeds", None)
        x = read(input_ids) if x is None else x
        inner = next((p for p in self.backbone.parameters() if p is not getattr(read, "weight", None)), x)
        out = self.backbone(inputs_embeds=x.to(inner.dtype), attention_mask=attention_mask, **kwargs)
        h = out.last_hidden_state
        if hasattr(self, "shadow_hidden_projection"):
            h = self.shadow_hidden_projection(h)
        if not hasattr(self, "head"):
            return h
        if not self.is_classification:
            h = h[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else h[:, -logits_to_keep:]
        logits, loss = self.head(h.to(next(self.head.parameters()).dtype)), None
        if self.is_classification:
            logits = last_tokens(logits, input_ids, self.config.pad_token_id, attention_mask)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.get("past_key_values"),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
