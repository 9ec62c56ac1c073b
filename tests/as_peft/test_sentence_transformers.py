"""sentence-transformers: adapters on a real small encoder and on a tiny random one."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.as_peft import tiny
from trimtab.files.sources import packaged_minilm

CONFIG = {"task_type": TaskType.FEATURE_EXTRACTION, "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    """The folder of a tiny random encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny.bert(len(tokenizer), "BertModel").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encoder(folder: str) -> SentenceTransformer:
    words = Transformer(folder)
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


def move(model: SentenceTransformer) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)


def test_minilm_with_an_adapter_saves_and_loads(tmp_path):
    model = SentenceTransformer(str(packaged_minilm()), device="cpu")
    plain = torch.tensor(model.encode(tiny.SENTENCES[:3]))
    model.add_adapter(LoraConfig(**CONFIG), "mine")
    assert model.active_adapters() == ["mine"]
    torch.testing.assert_close(torch.tensor(model.encode(tiny.SENTENCES[:3])), plain)
    move(model)
    adapted = torch.tensor(model.encode(tiny.SENTENCES[:3]))
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.disable_adapters()
    torch.testing.assert_close(torch.tensor(model.encode(tiny.SENTENCES[:3])), plain)
    model.enable_adapters()
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1_500_000
    again = SentenceTransformer(str(packaged_minilm()), device="cpu")
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(torch.tensor(again.encode(tiny.SENTENCES[:3])), adapted)
    whole = SentenceTransformer(str(tmp_path), device="cpu")  # the folder names its base model
    torch.testing.assert_close(torch.tensor(whole.encode(tiny.SENTENCES[:3])), adapted)


def test_training_an_adapter_with_its_own_trainer(base, tmp_path):
    model = encoder(base)
    model.add_adapter(LoraConfig(**CONFIG))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = Dataset.from_dict(
        {"anchor": tiny.SENTENCES[:12], "positive": [s.replace("the", "a") for s in tiny.SENTENCES[:12]]}
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=losses.MultipleNegativesRankingLoss(model)
    ).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)
    adapted = torch.tensor(model.encode(tiny.SENTENCES[:3]))
    model.delete_adapter("default")
    plain = torch.tensor(encoder(base).encode(tiny.SENTENCES[:3]))
    torch.testing.assert_close(torch.tensor(model.encode(tiny.SENTENCES[:3])), plain)
    assert not torch.allclose(adapted, plain, atol=1e-4)
