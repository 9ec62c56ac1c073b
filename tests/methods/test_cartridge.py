"""Cartridges: in front of every layer's keys and values, started from a text, joined."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import same
from tests.models import llama, tokens
from trimtab import (
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)


class Letters:
    """A tokenizer of letters; its chat template puts a mark in front."""

    def __call__(self, text, truncation=False, max_length=None, return_tensors="pt"):
        return {"input_ids": torch.tensor([[ord(c) % 60 + 3 for c in text][:max_length]])}

    def apply_chat_template(self, messages, **asked):
        return torch.tensor([[1] + [ord(c) % 60 + 3 for c in messages[0]["content"]]])


def model(kind=CartridgeConfig, **fields):
    return get_peft_model(llama(), kind(task_type="CAUSAL_LM", **{"num_virtual_tokens": 6, **fields})).eval()


@pytest.mark.parametrize("kind", [CartridgeConfig, PrefixTuningConfig])
def test_started_from_a_text_the_model_reads_on_behind_it(kind) -> None:
    adapted, x = model(kind), tokens(vocabulary=64)
    initialize_kv_prefix_from_text(adapted, Letters(), text="abcdef", use_chat_template=False)
    text = Letters()("abcdef")["input_ids"].expand(len(x), -1)
    same(adapted(x).logits, llama().eval()(torch.cat([text, x], 1)).logits[:, 6:], 1e-5)


def test_chat_template_and_length() -> None:
    adapted, base = model(), llama().eval()
    for kwargs, ids in (({}, [1, *range(40, 45)]), ({"use_chat_template": False, "max_length": 6}, range(40, 46))):
        got = initialize_kv_prefix_from_text(adapted, Letters(), text="abcdefgh", **kwargs)
        ids = torch.tensor(
            [[1, *[ord(c) % 60 + 3 for c in "abcde"]] if not kwargs else [ord(c) % 60 + 3 for c in "abcdef"]]
        )
        want = prompt_embeddings_from_past_key_values(base(ids).past_key_values, num_virtual_tokens=6)
        same(got, want, 1e-6)
        same(adapted.get_prompt_embedding_to_save("default"), want, 1e-6)


def test_the_first_tokens_stay() -> None:
    adapted, x = model(num_frozen_tokens=2), tokens(vocabulary=64)
    before = adapted.get_prompt_embedding_to_save("default").clone()
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(x, labels=x).loss.backward()
    optimiser.step()
    moved = (adapted.get_prompt_embedding_to_save("default") != before).any(1)
    assert moved.tolist() == [False, False, True, True, True, True]
    adapted.set_requires_grad("default", False)
    adapted.set_adapter("default")
    assert [n.split(".")[-1] for n, p in adapted.named_parameters() if p.requires_grad] == ["trainable_embedding"]


def test_joined(tmp_path) -> None:
    parts, x = [model(num_frozen_tokens=2), model(num_virtual_tokens=3)], tokens(vocabulary=64)
    for i, part in enumerate(parts):
        part.save_pretrained(tmp_path / str(i))
    compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    config = PeftConfig.from_pretrained(tmp_path / "both")
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (9, 2)
    both = PeftModel.from_pretrained(llama(), tmp_path / "both")
    want = torch.cat([p.get_prompt_embedding_to_save("default") for p in parts])
    assert torch.equal(both.get_prompt_embedding_to_save("default"), want)
    assert both(x).logits.shape == (*x.shape, 64)


def test_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_frozen_tokens"):
        CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3)
    with pytest.raises(ValueError, match="num_frozen_tokens"):
        CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=-1)
    cache = llama().eval()(torch.tensor([[1, 2, 3]])).past_key_values
    with pytest.raises(ValueError, match="at least 6 cached tokens, got 3"):
        initialize_kv_prefix_from_past_key_values(model(), past_key_values=cache)
    with pytest.raises(ValueError, match="prefix_projection"):
        initialize_kv_prefix_from_past_key_values(
            model(PrefixTuningConfig, prefix_projection=True), past_key_values=cache
        )
    with pytest.raises(ValueError, match="CARTRIDGE"):
        initialize_kv_prefix_from_past_key_values(model(PromptTuningConfig), past_key_values=cache)
    with pytest.raises(ValueError, match="at least 2"):
        compose_cartridge_adapters([tmp_path], output_path=tmp_path)
    model(PromptTuningConfig).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="Only cartridges"):
        compose_cartridge_adapters([tmp_path / "prompt"] * 2, output_path=tmp_path)
