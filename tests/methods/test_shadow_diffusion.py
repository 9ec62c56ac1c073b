"""Shadow beside models that are none of transformers: the formula, two streams, off and on, copies, files, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.diffusion import Plain, batch, build, out
from trimtab import LoraConfig, PeftModel, ShadowConfig, get_peft_model
from trimtab.errors import ConfigError, RouteError

UNET_BLOCKS = {"target_modules": ["down_blocks.0.attentions.0.transformer_blocks.0"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "pixart": {}, "sd3": {}, "flux1": {}, "flux2": {}, "aura": {"shadow_hidden_size": 6},
    "unet": UNET_BLOCKS,
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def shadowed(name: str, **fields: Any) -> Any:
    base = build(name)
    torch.manual_seed(1)
    config = ShadowConfig(**{"r": 3, "shadow_alpha": 0.5, "init_weights": False, **CASES[name], **fields})
    return get_peft_model(base, config).eval()


def grads(model: Any, name: str) -> dict[str, Tensor]:
    out(model, name).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("width", [None, 5])
def test_the_formula_in_plain_code(width: int | None) -> None:
    model = shadowed("plain", shadow_num_hidden_layers=2, shadow_hidden_size=width, shadow_intermediate_size=7)
    own = dict(model.base_model.shadow_backbone["default"].named_parameters())
    line = lambda part, x: x @ own[f"{part}.weight"].T + own[f"{part}.bias"]
    base = model.get_base_model()
    h = base.into(batch("plain")["hidden_states"])
    s = line("proj_in", h)
    for i in range(2):
        normed = (s - s.mean(-1, keepdim=True)) / (s.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = normed * own[f"blocks.{i}.0.weight"] + own[f"blocks.{i}.0.bias"]
        s = s + line(f"blocks.{i}.3", F.gelu(line(f"blocks.{i}.1", normed)))
    if width:
        s = s @ model.base_model.shadow_projection["default"].weight.T
    for block, plain in zip(base.blocks, build("plain").blocks, strict=True):
        U, D = block.shadow_up["default"].weight, block.shadow_down["default"].weight

        def network(kind: str, x: Tensor, block: Any = block) -> Tensor:
            W = dict(getattr(block, f"shadow_update_{kind}")["default"].named_parameters())
            return F.gelu(x @ W["0.weight"].T + W["0.bias"]) @ W["2.weight"].T + W["2.bias"]

        h = plain(h + 0.5 * ((h - s) @ D.T @ U.T))
        g = torch.sigmoid(network("gate", h))
        s = g * network("transform", h) + (1 - g) * s
    torch.testing.assert_close(out(model, "plain"), base.out(h))


@every
def test_off_and_on_and_copied(name: str) -> None:
    plain, fresh, model = out(build(name), name), shadowed(name, init_weights=True), shadowed(name)
    assert torch.equal(out(fresh, name), plain)
    said = out(model, name)
    assert (said - plain).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(out(model, name), plain)
    copied = copy.deepcopy(model)
    assert torch.equal(out(copied, name), said)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(out(model, name), said)
    assert torch.equal(out(model.unload(), name), plain)


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = shadowed(name)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(build(name), tmp_path)
    torch.testing.assert_close(out(read, name), out(model, name), rtol=1e-5, atol=1e-6)


@every
def test_every_part_that_acts_is_trained(name: str) -> None:
    """Gradients come to the small model and to every block; the last block's shadow state goes nowhere."""
    found = grads(shadowed(name), name)
    assert any("shadow_backbone" in n for n in found)
    blocks = {n.partition(".shadow_")[0] for n, _ in shadowed(name).named_parameters() if "shadow_down" in n}
    for block in blocks:
        assert found[f"{block}.shadow_up.default.weight"].abs().max() > 0
        assert found[f"{block}.shadow_down.default.weight"].abs().max() > 0
    assert not any("shadow_" not in n for n in found)


@pytest.mark.parametrize("name", ["sd3", "flux2", "pixart"])
def test_checkpointing(name: str) -> None:
    wanted = grads(shadowed(name, shadow_dropout=0.0).train(), name)
    model = shadowed(name, shadow_dropout=0.0).train()
    model.get_base_model().enable_gradient_checkpointing()
    found = grads(model, name)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad)


def test_checkpointing_that_would_lose_the_shadows_gradients_is_refused() -> None:
    model = shadowed("plain").train()
    base = model.get_base_model()
    repeat = torch.utils.checkpoint.checkpoint

    def forward(hidden_states: Tensor) -> tuple[Tensor]:
        x = base.into(hidden_states).requires_grad_()
        for block in base.blocks:
            x = repeat(block, x, use_reentrant=True)
        return (base.out(x),)

    base.forward = forward
    with pytest.raises(RouteError, match="use_reentrant=False"):
        out(model, "plain").sum().backward()


@pytest.mark.parametrize("name", ["flux1", "flux2", "plain"])
def test_rows_of_a_mixed_batch(name: str) -> None:
    model = shadowed(name)
    torch.manual_seed(2)
    model.add_adapter("other", ShadowConfig(r=2, shadow_alpha=1.0, init_weights=False))
    model.eval()
    mixed = out(model, name, adapter_names=["default", "other"])
    for row, adapter in enumerate(("default", "other")):
        model.set_adapter(adapter)
        torch.testing.assert_close(mixed[row], out(model, name)[row], rtol=1e-4, atol=1e-5)


def test_half_precision_and_another_adapter() -> None:
    base = build("flux2").to(torch.bfloat16)
    torch.manual_seed(1)
    model = get_peft_model(base, ShadowConfig(init_weights=False)).eval()
    assert {p.dtype for p in model.base_model.shadow_backbone["default"].parameters()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch("flux2").items()}
    said = model(**inputs, return_dict=False)[0]
    assert said.dtype == torch.bfloat16
    said.float().square().mean().backward()
    model.add_adapter("second", LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.equal(model(**inputs, return_dict=False)[0], said)
    model.set_adapter("default")
    assert torch.equal(model(**inputs, return_dict=False)[0], said)


def test_a_quantised_base_is_read_as_numbers() -> None:
    base, plain = build("flux2"), shadowed("flux2")
    quantize_(base, Int8WeightOnlyConfig())
    model = get_peft_model(base, ShadowConfig(init_weights=False)).eval()
    held = dict(model.base_model.shadow_backbone["default"].named_parameters())
    for name, parameter in plain.base_model.shadow_backbone["default"].named_parameters():
        torch.testing.assert_close(held[name], parameter, rtol=0, atol=0.02)
    assert out(model, "flux2").isfinite().all()


def test_a_start_from_the_base_is_a_copy() -> None:
    """A Flux2's start is a copy: nothing of the base moves with it."""
    model = shadowed("flux2")
    before = {n: p.clone() for n, p in model.get_base_model().named_parameters() if "shadow_" not in n}
    with torch.no_grad():
        for parameter in model.base_model.shadow_backbone["default"].parameters():
            parameter.add_(1)
    now = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items())


def test_what_is_refused(tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("unet", {"target_modules": None}, "name some in `target_modules`"),
        ("unet", {"target_modules": ["transformer_blocks.0"]}, "blocks of one width"),
        ("plain", {"shadow_model": str(tmp_path)}, '`shadow_model` is "mirror"'),
        ("plain", {"task_type": "SEQ_CLS"}, "no classifier"),
        ("flux2", {"shadow_model": str(tmp_path)}, "no model at"),
        ("flux2", {"shadow_hidden_size": 12}, "no multiple of a head"),
        ("flux2", {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}, "not that of 2 heads"),
        ("flux2", {"shadow_num_hidden_layers": 2}, "4 num_single_layers"),
        ("flux2", {"shadow_intermediate_size": 40}, "40 wide inside"),
        ("flux2", {"target_modules": ["transformer_blocks.0"]}, "single_transformer_blocks"),
    ]
    for name, fields, said in wrong:
        base = build(name)
        held = dict(base.named_modules())
        with pytest.raises(ConfigError, match=said):
            get_peft_model(base, ShadowConfig(**fields))
        assert dict(base.named_modules()) == held
    with pytest.raises(RouteError, match="kv_cache_mode"):
        out(shadowed("flux2"), "flux2", kv_cache_mode="extract", num_ref_tokens=2)
    inputs = batch("sd3")
    inputs["encoder_hidden_states"] = torch.randn(2, 16, 12)  # as many tokens as the image has
    with pytest.raises(RouteError, match="cannot be told by their shape"):
        shadowed("sd3")(**inputs)
    with pytest.raises(NotImplementedError, match="no model by itself"):
        shadowed("plain").unload_shadow()
    with pytest.raises(RouteError, match="call the PeftModel"):
        shadowed("plain").get_base_model()(batch("plain")["hidden_states"])


def test_a_stack_that_is_called_by_name_or_place() -> None:
    model = shadowed("plain")
    assert isinstance(model.get_base_model(), Plain)
    assert torch.equal(model(batch("plain")["hidden_states"])[0], out(model, "plain"))
