"""Every method generates what its forward passes say, with a cache, without one, and where tokens are guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import get_peft_model
from trimtab.methods import METHODS, capabilities, config_class, load

NEW, IDS = 6, torch.stack([torch.arange(2, 10), torch.arange(22, 30)])
# Fields by which a method fits layers of this size.
SMALLER: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_layers": 1},
    "C3A": {"block_size": 16},
    "LORA (alora_invocation_tokens)": {"alora_invocation_tokens": [5, 6]},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 25]},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 64},
}
# Of another kind: it needs biases, other adapters, a quantised base, or weighs all tokens of a pass together.
ELSEWHERE = {"BITFIT", "XLORA", "LORA (use_qalora)", "LORA (arrow_config)", "LILY"}
PROMPTS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
MOVING = {"LOREFT"}  # the places it edits are counted from the end of what a forward is given
EXTRAS = {kind: load(file, cls).extras for kind, (file, cls, _) in METHODS.items()}
NAMES = [facts.method for facts in capabilities() if facts.method not in ELSEWHERE]


def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, eos_token_id=None, pad_token_id=0, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def adapted(name: str) -> Any:
    """A model with an adapter of this method, far from its start."""
    kind, _, field = name.partition(" ")
    file, cls, _ = METHODS[kind]
    place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
    fields = {**load(*place).example, **SMALLER.get(name, {})}
    model = get_peft_model(llama(), config_class(kind)(task_type="CAUSAL_LM", **fields))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generates_the_same_with_a_cache_and_without(name: str) -> None:
    model = adapted(name)
    rows = {"task_ids": torch.tensor([0, 0])} if "task_ids" in EXTRAS[name.partition(" ")[0]] else {}
    generate = lambda ids=IDS, **more: model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **more)
    found = generate(**rows)
    given = {"input_ids": IDS, **rows}
    assert not torch.allclose(model(**given).logits[:, -1], llama()(input_ids=IDS).logits[:, -1], atol=1e-3)
    if name not in MOVING:
        wanted = IDS
        for _ in range(NEW):
            wanted = torch.cat([wanted, model(input_ids=wanted, **rows).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, wanted)
    assert torch.equal(generate(**rows, use_cache=False), found)
    beams = generate(**rows, num_beams=2)
    assert torch.equal(generate(**rows, num_beams=2, use_cache=False), beams)
    if name not in PROMPTS:
        one = {key: value[:1] for key, value in rows.items()}
        assert torch.equal(generate(IDS[:1], **one, prompt_lookup_num_tokens=3), found[:1])
