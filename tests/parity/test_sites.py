"""LoRA and DoRA on convolutions, attention and named parameters: what PEFT computes and writes, and where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import trimtab
from tests.parity.models import build
from tests.parity.pairs import (
    BOTH,
    adapt,
    config_file,
    dropping,
    gradients,
    load,
    near,
    parameters,
    quiet,
    run,
    trainable,
    weights_file,
)
from tests.parity.pairs import pair as same_numbers

transformers.logging.set_verbosity_error()

CONVS = ["one", "two", "three", "point"]
ATTENTIONS = ["self_attn", "cross_attn", "head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("conv", {"target_modules": CONVS, "r": 4, "lora_alpha": 6}),
    "conv_dropout": ("conv", {"target_modules": CONVS, "r": 4, "lora_dropout": 0.3}),
    "conv_pattern": ("conv", {"target_modules": CONVS, "rank_pattern": {"two": 3}, "alpha_pattern": {"one": 2}}),
    "conv_gaussian": ("conv", {"target_modules": CONVS, "init_lora_weights": "gaussian", "r": 4}),
    "conv_dora": ("conv", {"target_modules": CONVS, "r": 4, "lora_alpha": 6, "use_dora": True}),
    "conv_dora_dropout": ("conv", {"target_modules": CONVS, "r": 4, "lora_dropout": 0.3, "use_dora": True}),
    "groups": ("conv_groups", {"target_modules": CONVS, "r": 4, "lora_alpha": 6}),
    "attention": ("attention", {"target_modules": ATTENTIONS, "r": 3, "lora_alpha": 5}),
    "attention_second": ("attention_second", {"target_modules": ATTENTIONS, "r": 3, "lora_alpha": 5}),
    "attention_unbiased": ("attention_unbiased", {"target_modules": ATTENTIONS, "r": 3}),
    "attention_pattern": ("attention", {"target_modules": ATTENTIONS, "rank_pattern": {"self_attn": 2}}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2, "lora_alpha": 5}),
    "mixtral_one": ("mixtral", {"target_parameters": ["down_proj"], "r": 2, "rank_pattern": {"down_proj": 3}}),
    "mixtral_order": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[::-1], "r": 2}),
    "mixtral_rslora": ("mixtral", {"target_parameters": EXPERTS, "use_rslora": True, "alpha_pattern": {"down_proj": 3}}),
    "mixtral_gaussian": ("mixtral", {"target_parameters": EXPERTS, "r": 2, "init_lora_weights": "gaussian"}),
    "router": ("mixtral", {"target_parameters": ["gate.weight", "layers.1.mlp.experts.gate_up_proj"], "r": 2}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ["k_proj"], "target_parameters": EXPERTS, "r": 2, "lora_alpha": 5}),
    "llama4": ("llama4", {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "r": 2, "lora_alpha": 5}),
    "gpt_oss": ("gpt_oss", {"target_modules": ["v_proj"], "target_parameters": EXPERTS, "r": 2, "lora_alpha": 5}),
    "linear_by_name": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight", "lm_head.weight"], "r": 2}),
}  # fmt: skip
# PEFT adds the update of an attention's output projection twice (codec.ADDED): the same file means the same function,
# but the B in memory is twice theirs.
TWICE = ".out_proj.lora_B."


def pair(name: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """(ours, theirs), holding what means the same under the same names."""
    ours, theirs = same_numbers(name, fields)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if TWICE in key:
                parameter.mul_(2)
    return ours, theirs


each = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)
PEFT_CANNOT_MERGE = ("conv_groups",)


@each
def test_names_and_shapes(name: str, fields: dict[str, Any]) -> None:
    """Parameters have PEFT's names, shapes and states, in the model and in its state dict."""
    ours, theirs = (adapt(library, name, fields) for library in BOTH)
    mine, other = parameters(ours), parameters(theirs)
    assert mine.keys() == other.keys()
    assert {n: (p.shape, p.dtype) for n, p in mine.items()} == {n: (p.shape, p.dtype) for n, p in other.items()}
    assert trainable(ours) == trainable(theirs)
    assert sorted(ours.targeted_module_names) == sorted(theirs.targeted_module_names)
    assert sorted(ours.targeted_parameter_names) == sorted(theirs.targeted_parameter_names)


@each
def test_outputs_and_gradients(name: str, fields: dict[str, Any]) -> None:
    """The same numbers in give the same numbers out, in training (without dropout) and in evaluation."""
    ours, theirs = pair(name, fields)
    train = not dropping(fields)
    near(run(ours.train(train), name), run(theirs.train(train), name))
    near(run(ours.eval(), name), run(theirs.eval(), name))
    mine, other = gradients(ours, name, train), gradients(theirs, name, train)
    assert mine.keys() == other.keys()
    for key, gradient in other.items():
        # ... while its gradient sees one of the two
        near(mine[key] / (2 if ".out_proj.lora_A." in key else 1), gradient)


@each
def test_merge(name: str, fields: dict[str, Any]) -> None:
    """Merged weights are PEFT's; the merged model computes what the adapted one did; nothing is lost by unmerging."""
    ours, theirs = (model.eval() for model in pair(name, fields))
    before = run(ours, name)
    if name in PEFT_CANNOT_MERGE:
        with pytest.raises(NotImplementedError):
            quiet(theirs.merge_adapter)
        with pytest.raises(trimtab.errors.ReadOnlyWeight, match="groups"):
            quiet(ours.merge_adapter)
        assert torch.equal(run(ours, name), before)
        return
    ours.merge_adapter()
    near(run(ours, name), before, 3e-5)
    ours.unmerge_adapter()
    assert torch.equal(run(ours, name), before)
    merged, other = quiet(ours.merge_and_unload), quiet(theirs.merge_and_unload)
    assert parameters(merged).keys() == parameters(other).keys()
    for key, weight in parameters(other).items():
        near(parameters(merged)[key], weight)
    near(run(merged, name), before, 3e-5)


@each
def test_files(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Both write the same files, and each reads the other's."""
    ours, theirs = (model.eval() for model in pair(name, fields))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    mine, other = weights_file(tmp_path / "ours"), weights_file(tmp_path / "theirs")
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        near(tensor, other[key], 0)
    wanted = run(theirs, name)
    for library in BOTH:
        for folder in ("ours", "theirs"):
            near(run(load(library, name, tmp_path / folder), name), wanted, 3e-5)


@each
def test_base_returns(name: str, fields: dict[str, Any]) -> None:
    """Off, it is the base bit by bit; taken out, the very modules and parameters are back."""
    base = build(name).eval().requires_grad_(False)  # frozen, PyTorch's attention takes another way
    modules, weights, wanted = dict(base.named_modules()), dict(base.named_parameters()), run(base, name)
    model = quiet(trimtab.get_peft_model, base, trimtab.LoraConfig(**{**fields, "init_lora_weights": False}))
    assert not torch.equal(run(model.eval(), name), wanted)
    with model.disable_adapter():
        assert torch.equal(run(model, name), wanted)
    back = model.unload()
    assert dict(back.named_modules()) == modules
    assert all(p is weights[n] for n, p in back.named_parameters())
    assert torch.equal(run(back, name), wanted)


def test_two_adapters_on_some_and_all_parameters(tmp_path: Path) -> None:
    """PEFT refuses it. Whoever comes first, each file is what PEFT would write of that adapter alone."""
    some = trimtab.LoraConfig(r=2, target_parameters=["experts.down_proj"], init_lora_weights=False)
    both = trimtab.LoraConfig(r=2, target_parameters=EXPERTS, init_lora_weights=False)
    model = trimtab.get_peft_model(build("mixtral"), some, "some").eval()
    first = run(model, "mixtral")
    model.add_adapter("both", both)
    near(run(model.eval(), "mixtral"), first, 0)
    model.set_adapter("both")
    second = run(model, "mixtral")
    mixed = run(model.eval(), "mixtral", adapter_names=["both", "some", "both"])
    near(mixed[[0, 2]], second[[0, 2]])
    near(mixed[1], first[1])
    model.save_pretrained(tmp_path)
    outer = {k for k in weights_file(tmp_path / "both") if ".base_layer." not in k}
    assert set(weights_file(tmp_path / "some")) == outer
    names = set(dict(model.named_parameters()))
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.both.weight" in names
    for library in BOTH:
        near(run(load(library, "mixtral", tmp_path / "some"), "mixtral"), first, 3e-5)
        near(run(load(library, "mixtral", tmp_path / "both"), "mixtral"), second, 3e-5)


def test_dropout_on_experts_loads_for_inference(tmp_path: Path) -> None:
    """An adapter trained with dropout elsewhere loads (PEFT raises); training it so here is refused."""
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2}
    model = adapt(trimtab, "mixtral", {**fields, "init_lora_weights": False}).eval()
    model.peft_config["default"].lora_dropout = 0.1
    quiet(model.save_pretrained, tmp_path)
    near(run(load(trimtab, "mixtral", tmp_path), "mixtral"), run(model, "mixtral"), 0)
    with pytest.raises(ValueError, match="lora_dropout"):
        load(trimtab, "mixtral", tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="lora_dropout"):
        adapt(trimtab, "mixtral", {**fields, "lora_dropout": 0.1})
    with pytest.warns(trimtab.errors.PeftWarning, match="trained without"):
        trimtab.get_peft_model(build("attention"), trimtab.LoraConfig(target_modules=["self_attn"], lora_dropout=0.1))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
                                  {"init_lora_weights": "orthogonal"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "attention", "conv"])
def test_what_peft_cannot_start(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """DoRA, PiSSA, OLoRA and the orthogonal start on experts, attention and convolutions: they start as the base."""
    targets = {"conv": {"target_modules": CONVS}, "attention": {"target_modules": ATTENTIONS}}
    fields: dict[str, Any] = {"r": 2, **targets.get(name, {"target_parameters": EXPERTS}), **more}
    base = build(name).eval().requires_grad_(False)
    wanted = run(base, name)
    model = trimtab.get_peft_model(base, trimtab.LoraConfig(**fields)).eval()
    near(run(model, name), wanted, 3e-5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))), alpha=0.1)
    moved = run(model, name)
    assert not torch.allclose(moved, wanted, atol=1e-2)
    model.save_pretrained(tmp_path)
    near(run(load(trimtab, name, tmp_path), name), moved, 3e-5)
    model.merge_adapter()
    near(run(model, name), moved, 3e-5)
    assert torch.equal(run(model.unload(pristine=True), name), wanted)


# ---------------------------------------------------------------------- experts under their former names
FORMER: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"], "r": 2, "lora_alpha": 6}),
    "mixtral_gate_up": ("mixtral", {"target_modules": ["w1", "w3"], "r": 2}),
    "mixtral_regex": ("mixtral", {"target_modules": r".*\.(w1|w2|w3)", "r": 2}),
    "mixtral_gate": ("mixtral", {"target_modules": ["block_sparse_moe.gate", "q_proj"], "r": 2}),
    "mixtral_down": ("mixtral", {"target_modules": ["experts.0.w2"], "r": 2, "use_rslora": True}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 2, "lora_alpha": 6}),
    "qwen2_moe": ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 2}),
}


@pytest.mark.parametrize(("name", "fields"), FORMER.values(), ids=FORMER)
def test_former_names_of_experts(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Configs from before transformers 5 are read as PEFT reads them, and say so."""
    ours, theirs = same_numbers(name, fields)
    near(run(ours.eval(), name), run(theirs.eval(), name))
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    mine, other = (config_file(tmp_path / folder) for folder in ("ours", "theirs"))
    assert (mine.pop("target_parameters") or []) == (other.pop("target_parameters") or [])
    assert mine == other


def test_half_of_a_fused_projection_is_refused() -> None:
    for library in BOTH:
        with pytest.raises(ValueError, match="w3"):
            adapt(library, "mixtral", {"target_modules": ["w1", "w2"]})


def test_files_from_before_transformers_5(tmp_path: Path) -> None:
    """A file with one pair for each Linear of each expert gives what PEFT makes of it."""
    draw = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for name, (out, into) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(2, into, generator=draw)
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, 2, generator=draw)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["w1", "w2", "w3"], "lora_dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    ours, theirs = (load(library, "mixtral", tmp_path) for library in BOTH)
    near(run(ours, "mixtral"), run(theirs, "mixtral"))
    mine, other = parameters(ours), parameters(theirs)
    assert mine.keys() == other.keys()
    for key, value in other.items():
        near(mine[key], value, 0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "lora_dropout": 0.1}))
    near(run(load(trimtab, "mixtral", tmp_path), "mixtral"), run(theirs, "mixtral"))  # PEFT raises


def test_all_linear_leaves_routers_alone_and_says_so() -> None:
    """PEFT adapts the routers as well, and on Llama 4 that model then cannot run."""
    with pytest.warns(trimtab.errors.PeftWarning, match="routers are left alone"):
        model = trimtab.get_peft_model(build("mixtral"), trimtab.LoraConfig(r=2, target_modules="all-linear"))
    theirs = adapt(peft, "mixtral", {"r": 2, "target_modules": "all-linear"})
    assert {n for n in trainable(theirs) if ".gate." not in n} == trainable(model)
    model = adapt(trimtab, "llama4", {"r": 2, "target_modules": "all-linear"})
    assert not any("router" in n for n in trainable(model))
    assert run(model, "llama4").isfinite().all()
