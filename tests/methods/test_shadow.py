"""Shadow: the formula in plain code, off and on, generation with and without a cache, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.models import grown, llama
from trimtab import LoraConfig, ShadowConfig, fuse_loss, get_peft_model
from trimtab.errors import ConfigError, ReadOnlyWeight, RouteError

IDS = torch.tensor([[4, 9, 11, 7, 30, 2], [8, 3, 21, 10, 6, 5]])


def base(dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"num_hidden_layers": 3, "vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return grown(llama(**sizes, eos_token_id=None, pad_token_id=None), 6).to(dtype)


def shadowed(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = ShadowConfig(task_type="CAUSAL_LM", **{"r": 3, "shadow_alpha": 0.5, "init_weights": False, **fields})
    return get_peft_model(base(dtype), config).eval()


@pytest.mark.parametrize("width", [None, 8])
def test_the_formula_in_plain_code(width: int | None) -> None:
    model, plain = shadowed(shadow_hidden_size=width), base()
    parts = model.base_model.shadow_backbone["default"]
    small_config = copy.deepcopy(plain.config)
    small_config.num_hidden_layers, small_config.hidden_size = 1, width or 16
    small = LlamaForCausalLM(small_config).model.eval()
    small.load_state_dict(dict(parts.named_parameters()), strict=width is not None)
    embedded = plain.get_input_embeddings()(IDS)
    s = small(inputs_embeds=embedded if width is None else None, input_ids=IDS if width else None).last_hidden_state
    if width:
        s = s @ model.base_model.shadow_projection["default"].weight.T
    h, turns = embedded, plain.model.rotary_emb(embedded, torch.arange(6)[None])
    for layer, block in zip(plain.model.layers, model.get_base_model().model.layers, strict=True):
        U, D = block.shadow_up["default"].weight, block.shadow_down["default"].weight

        def network(name: str, x: torch.Tensor, block: Any = block) -> torch.Tensor:
            own = dict(getattr(block, name)["default"].named_parameters())
            return torch.nn.functional.gelu(x @ own["0.weight"].T + own["0.bias"]) @ own["2.weight"].T + own["2.bias"]

        h = layer(h + 0.5 * ((h - s) @ D.T @ U.T), position_embeddings=turns)
        g = 1 / (1 + torch.exp(-network("shadow_update_gate", h)))
        s = g * network("shadow_update_transform", h) + (1 - g) * s
    expected = plain.lm_head(plain.model.norm(h))
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain(IDS).logits).abs().max() > 0.1


def test_it_starts_as_the_base_and_comes_off() -> None:
    fresh = shadowed(init_weights=True)
    assert torch.equal(fresh(IDS).logits, base()(IDS).logits)
    model = shadowed()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base()(IDS).logits)
    out = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, out)
    assert torch.equal(model.unload()(IDS).logits, base()(IDS).logits)


def test_a_cache_changes_no_answer() -> None:
    model = shadowed(shadow_num_hidden_layers=2)
    answers = [
        model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cached, num_beams=beams)
        for beams in (1, 3)
        for cached in (True, False)
    ]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[2], answers[3])


def test_a_padded_row_says_what_it_does_alone() -> None:
    model = shadowed()
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=places).logits[:, 2:]
    torch.testing.assert_close(out, model(IDS[:1]).logits, rtol=1e-4, atol=1e-4)


def test_blocks_above_the_first() -> None:
    model = shadowed(target_modules=["layers.1", "layers.2"])
    assert (model(IDS).logits - base()(IDS).logits).abs().max() > 0.01
    with pytest.raises(RouteError, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=3)
    assert model.generate(IDS, max_new_tokens=3, use_cache=False).shape == (2, 9)
    some = shadowed(layers_to_transform=[1, 2])
    assert [n for n, _ in some.named_parameters() if "shadow_down" in n] == [
        f"base_model.model.model.layers.{i}.shadow_down.default.weight" for i in (1, 2)
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    grads = []
    for checkpoints in (False, True):
        model = shadowed(shadow_dropout=0.0).train()
        if checkpoints:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) > 20
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_half_precision_and_other_adapters_beside_it() -> None:
    model = shadowed(torch.bfloat16)
    assert {p.dtype for p in model.base_model.shadow_backbone["default"].parameters()} == {torch.float32}
    model(IDS, labels=IDS).loss.backward()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    both = model.eval()
    alone = both(IDS).logits
    both.set_adapter("lora")
    assert not torch.equal(both(IDS).logits, alone)
    both.set_adapter("default")
    assert torch.equal(both(IDS).logits, alone)


@pytest.mark.parametrize("names", [["default", "lora"], ["lora", "default"], ["default", "default"]])
def test_rows_of_a_mixed_batch_are_what_each_adapter_says_alone(names: list[str]) -> None:
    model = shadowed()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mixed = model.eval()(IDS, adapter_names=names, use_cache=False).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(IDS, use_cache=False).logits[row])


def test_the_loss_of_the_first_state_is_of_training() -> None:
    model, without = shadowed(shadow_dropout=0.0), shadowed(shadow_dropout=0.0, auxiliary_loss_weight=0.0)
    assert torch.equal(model(IDS, labels=IDS).loss, without(IDS, labels=IDS).loss)
    assert model.train()(IDS, labels=IDS).loss > without.train()(IDS, labels=IDS).loss


def test_in_our_loop_head_and_loss_are_one_step() -> None:
    labels = IDS.clone()
    labels[:, :3] = -100
    losses, grads = [], []
    for fused in (False, True):
        model = shadowed(shadow_dropout=0.0).train()
        taken = fuse_loss(model) if fused else None
        assert (taken is not None) == fused
        kept = {"logits_to_keep": torch.arange(2, 6)} if fused else {}
        loss = model(IDS, labels=labels[:, 2:] if fused else labels, **kept).loss
        loss.backward()
        losses.append(loss)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_what_is_refused() -> None:
    with pytest.raises(ReadOnlyWeight, match="cannot be merged"):
        shadowed().merge_adapter()
    with pytest.raises(ConfigError, match="not for an encoder and a decoder"):
        ShadowConfig(task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match="no model at 'no/model/here'"):
        get_peft_model(base(), ShadowConfig(shadow_model="no/model/here"))
    with pytest.raises(ConfigError, match="has sizes of its own: leave out shadow_hidden_size"):
        ShadowConfig(shadow_model="some/model", shadow_hidden_size=8)
    with pytest.raises(ConfigError, match="`shadow_num_attention_heads` should be a positive"):
        shadowed(shadow_num_attention_heads=0)
    with pytest.raises(RouteError, match="call the PeftModel"):
        shadowed().get_base_model()(IDS)


@pytest.mark.parametrize("fields", [{}, {"shadow_hidden_size": 8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_model_comes_out_whole(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Any) -> None:
    """Its tensors are the adapter's, or copies; its file has all it needs; the model it came from is as it was."""
    model = shadowed(dtype, **fields)
    before = model(IDS).logits
    alone, apart = model.unload_shadow(), model.unload_shadow(copy=True)
    backbone = dict(model.base_model.shadow_backbone["default"].named_parameters())
    assert all(alone.backbone.get_parameter(name) is p for name, p in backbone.items())
    ours = {id(p) for p in model.parameters()}
    assert all(id(p) in ours for p in alone.parameters())
    assert not any(id(p) in ours for p in apart.parameters())
    assert alone.get_output_embeddings() is model.get_output_embeddings()
    wanted = alone(IDS).logits
    assert torch.equal(apart(IDS).logits, wanted)
    assert torch.equal(alone(inputs_embeds=alone.get_input_embeddings()(IDS)).logits, wanted)
    torch.testing.assert_close(alone(IDS, logits_to_keep=2).logits, wanted[:, -2:])
    assert torch.equal(alone.generate(IDS, max_new_tokens=3, do_sample=False), apart.generate(
        IDS, max_new_tokens=3, do_sample=False, use_cache=False))  # fmt: skip
    with torch.no_grad():
        for p in apart.parameters():
            p.add_(1)
    alone.save_pretrained(tmp_path)
    apart.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(apart(IDS).logits, wanted)
    assert torch.equal(model(IDS).logits, before)
    copied = copy.deepcopy(alone)
    assert torch.equal(copied(IDS).logits, wanted)


def test_a_tied_head_comes_with_it(tmp_path: Any) -> None:
    plain = llama(vocab_size=40, tie_word_embeddings=True)
    model = get_peft_model(plain, ShadowConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    for own in (False, True):
        alone = model.unload_shadow(copy=own)
        wanted = alone(IDS).logits
        alone.save_pretrained(tmp_path / str(own))
        there = load_file(tmp_path / str(own) / "model.safetensors")
        assert torch.equal(there.get("head.weight", there["backbone.embed_tokens.weight"]), plain.lm_head.weight)
        assert torch.equal(copy.deepcopy(alone)(IDS).logits, wanted)
