"""What PEFT's own example notebooks print and ask, on tiny models."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.models import build
from tests.parity.pairs import BOTH, config_of, quiet, spoken


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("vectors", [20, 300])
def test_how_much_vb_lora_saves(few: bool, vectors: int) -> None:
    answers = []
    for library in BOTH:
        config = library.VBLoRAConfig(
            r=2, num_vectors=vectors, vector_length=8, save_only_topk_weights=few,
            target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"],
        )  # fmt: skip
        model = quiet(library.get_peft_model, build("llama"), config)
        with redirect_stdout(io.StringIO()) as said:
            model.print_savable_parameters()
            model.base_model.print_savable_parameters()
        answers.append((model.get_nb_savable_parameters("default"), said.getvalue()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("names", ["zyx", "cab", "bca"])
def test_who_follows_the_active_adapter_that_is_deleted(names: str) -> None:
    followers = []
    for library in BOTH:
        fields = {"r": 2, "target_modules": ["q_proj"]}
        model = quiet(library.get_peft_model, build("llama"), config_of(library, fields), names[0])
        for name in names[1:]:
            quiet(model.add_adapter, name, config_of(library, fields))
        quiet(model.delete_adapter, names[0])
        followers.append(model.active_adapters)
    assert followers[0] == followers[1]


def test_why_the_embeddings_of_a_resized_vocabulary_are_saved(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    reasons = []
    for library in BOTH:
        model = build("llama")
        model.name_or_path = str(tmp_path / "base")
        quiet(model.resize_token_embeddings, model.config.vocab_size + 3)
        fields = {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
        model = quiet(library.get_peft_model, model, config_of(library, fields))
        said = spoken(model.save_pretrained, tmp_path / library.__name__)
        reasons.append({text.rstrip(".") for text in said if "save_embedding_layers" in text})
    assert reasons[0] == reasons[1]
    assert "as embedding layers found" in reasons[0].pop()


@pytest.mark.parametrize("given", [None, "my/base", "other/base"])
def test_a_config_names_the_model_it_is_used_on(given: str | None) -> None:
    named, warned = [], []
    for library in BOTH:
        model = build("llama")
        model.name_or_path = "my/base"
        config = config_of(library, {"r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": given})
        warned.append([text for text in spoken(library.get_peft_model, model, config) if "renamed" in text])
        named.append(quiet(library.get_peft_model, model, config).peft_config["default"].base_model_name_or_path)
    assert named == ["my/base", "my/base"]
    assert warned[0] == warned[1]
    assert len(warned[0]) == (given == "other/base")


class Around(nn.Module):
    """A model that passes on what it lacks itself, as the examples for embeddings of sentences have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        out: Tensor = self.model(**inputs).logits
        return torch.nn.functional.normalize(out.mean(1), dim=1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def test_a_model_around_another_is_not_named_by_its_path() -> None:
    named = []
    for library in BOTH:
        inner = build("llama")
        inner.name_or_path = "inner/model"
        fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}
        model = quiet(library.get_peft_model, Around(inner), config_of(library, fields))
        named.append(model.peft_config["default"].base_model_name_or_path)
    assert named == [None, None]
