"""Attributes of a layer by which scripts look at an adapter: those of PEFT's layers, with the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import nn

import trimtab
from tests.parity.models import build
from tests.parity.pairs import BOTH, adapt, quiet

LORA = [
    "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "in_features",
    "out_features", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "merged_adapters", "active_adapters",
    "disable_adapters",
]  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_dropout": 0.25, "use_rslora": True}, LORA),
    "lora, dry": ("LoraConfig", {"r": 4, "lora_bias": True}, LORA),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}, LORA[:10]),
    "loha": ("LoHaConfig", {"r": 4, "rank_dropout": 0.5}, ["r", "alpha", "scaling", "rank_dropout", "module_dropout", "hada_t1"]),
    "lokr": ("LoKrConfig", {"r": 4}, ["r", "alpha", "rank_dropout", "module_dropout", "lokr_t2"]),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}, ["oft_block_size"]),
    "boft": ("BOFTConfig", {"boft_block_size": 2}, ["boft_block_size"]),
    "vera": ("VeraConfig", {"r": 4, "vera_dropout": 0.5}, ["r", "vera_dropout"]),
    "road": ("RoadConfig", {"group_size": 2}, ["variant", "group_size"]),
    "shira": ("ShiraConfig", {"r": 2}, ["r"]),
}  # fmt: skip


def plain(value: Any) -> Any:
    """A value without the classes that it is made of."""
    if isinstance(value, nn.Dropout):
        return value.p
    if isinstance(value, nn.Identity):
        return 0.0
    if isinstance(value, Mapping | nn.ModuleDict | nn.ParameterDict):
        return {name: plain(value[name]) for name in value}
    return str(value) if isinstance(value, str) else value


def layer(library: Any, name: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = library.get_peft_model(build("llama"), getattr(library, name)(target_modules=["q_proj"], **fields))
    return next(m for path, m in model.named_modules() if path.endswith("q_proj"))


@pytest.mark.parametrize(("name", "fields", "attributes"), CASES.values(), ids=CASES)
def test_settings(name: str, fields: dict[str, Any], attributes: list[str]) -> None:
    mine, theirs = (layer(library, name, fields) for library in (trimtab, peft))
    shown = {a: plain(getattr(mine, a)) for a in attributes}
    assert shown == {a: plain(getattr(theirs, a)) for a in attributes}
    assert torch.equal(mine.get_base_weight(), theirs.get_base_weight())


def test_dropout_of_a_layer_can_be_changed() -> None:
    results = []
    for library in (trimtab, peft):
        at = layer(library, "LoraConfig", {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False}).train()
        x = torch.ones(1, 3, at.in_features)
        assert not torch.equal(at(x), at(x))
        at.lora_dropout["default"].p = 0.0
        assert torch.equal(at(x), at(x))
        at.lora_dropout["default"] = nn.Dropout(0.5)
        results.append(torch.equal(at(x), at(x)))
    assert results == [False, False]


def tuned(library: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    return library.get_peft_model(
        build("llama"), library.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **fields})
    )


def q_proj(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_starting_a_layer_anew() -> None:
    spreads = []
    for library in (trimtab, peft):
        at = q_proj(tuned(library, r=16, init_lora_weights=False))
        A, B = at.lora_A["default"].weight, at.lora_B["default"].weight
        before = A.detach().clone()
        at.reset_lora_parameters("default", False)
        at.reset_lora_parameters("unknown", True)
        assert torch.equal(A, before)
        assert B.any()
        found = []
        for init in (True, "gaussian"):
            at.reset_lora_parameters("default", init)
            assert not B.any()
            assert A is at.lora_A["default"].weight
            found.append(float(A.detach().std()))
        spreads.append(found)
        for init in ("zz", "pissa"):
            with pytest.raises(ValueError, match="init_lora_weights"):
                at.reset_lora_parameters("default", init)
    torch.testing.assert_close(*spreads, rtol=0.15, atol=0)
    at = q_proj(tuned(trimtab))
    before = at.get_base_weight().clone()
    at.reset_parameters()  # the frozen layer's own
    assert not torch.equal(at.get_base_weight(), before)
    for name, prefix in (("HRAConfig", "hra"), ("IA3Config", "ia3"), ("LoHaConfig", "adapter")):
        found = layer(trimtab, name, {"feedforward_modules": []} if prefix == "ia3" else {})
        start = {n: p.detach().clone() for n, p in found.named_parameters()}
        with torch.no_grad():
            for _, parameter in found.adapter_parameters("default"):
                parameter.add_(1)
        getattr(found, f"reset_{prefix}_parameters")("default")
        x = torch.ones(1, 3, found.in_features)
        torch.testing.assert_close(found(x), found.base_layer(x))
        assert all(torch.equal(found.get_parameter(n), p) for n, p in start.items() if "base_layer" in n)


def test_another_base_weight() -> None:
    outputs = []
    for library in (trimtab, peft):
        at = q_proj(tuned(library, lora_alpha=8))
        with torch.no_grad():
            for parameter in at.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        x = torch.ones(1, 3, at.in_features)
        at(x)
        weight = at.base_layer.weight
        at.set_base_weight(torch.eye(at.in_features))
        assert at.base_layer.weight is weight
        assert torch.equal(at.get_base_weight(), torch.eye(at.in_features))
        outputs.append(at(x))
    torch.testing.assert_close(*outputs)


def test_a_parameter_by_name() -> None:
    for library in (trimtab, peft):
        at = q_proj(tuned(library, target_modules=[], target_parameters=["q_proj.weight"], init_lora_weights=False))
        assert (at.parameter_name, at.num_experts) == ("weight", 1)
        assert at.get_param() is at.get_base_layer().weight
        B, A, scale = at.get_delta_factors("default")
        dW = scale * (B @ A).reshape(at.get_param().shape)
        if library is trimtab:
            torch.testing.assert_close(dW, at.get_delta_weight("default"))
        plain = q_proj(tuned(library))
        assert not hasattr(plain, "parameter_name")


def test_injecting_through_the_tuner() -> None:
    names = []
    for library in (trimtab, peft):
        model = tuned(library)
        tuner = model.base_model
        tuner.peft_config["more"] = library.LoraConfig(target_modules=["v_proj"], r=2)
        tuner.inject_adapter(tuner.model, "more")
        names.append([n for n, p in model.named_parameters() if "lora_" in n and p.requires_grad])
        assert sum("lora_A.more" in n for n, _ in model.named_parameters()) == 2
        assert model.active_adapter == "default"
        model.set_adapter("more")
        assert all(".more." in n for n, p in model.named_parameters() if p.requires_grad)
        assert isinstance(q_proj(model), tuner.tuner_layer_cls)
        assert tuner.supports_lora_conversion("default")
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["LoraConfig", "LoHaConfig", "VeraConfig", "OFTConfig"])
def test_default_targets_of_a_tuner(name: str) -> None:
    mine, theirs = (
        library.get_peft_model(build("llama"), getattr(library, name)()).base_model.target_module_mapping
        for library in (trimtab, peft)
    )
    assert {k: sorted(v) for k, v in theirs.items()}.items() <= {k: sorted(v) for k, v in mine.items()}.items()


LISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True, "lora_dropout": 0.1}),
    "adalora": ("AdaLoraConfig", {"total_step": 9}),
    "lokr": ("LoKrConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 2}),
    "road": ("RoadConfig", {"group_size": 2}),
    "c3a": ("C3AConfig", {"block_size": 4}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "vblora": ("VBLoRAConfig", {"r": 2, "vector_length": 8, "num_vectors": 8, "topk": 2}),
    "poly": ("PolyConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
}


@pytest.mark.parametrize(("name", "fields"), LISTED.values(), ids=LISTED)
def test_the_settings_that_a_layer_lists(name: str, fields: dict[str, Any]) -> None:
    """PEFT's, and the layer shows each of them."""
    mine, theirs = (quiet(layer, library, name, fields) for library in (trimtab, peft))
    assert sorted(mine.other_param_names) == sorted(theirs.other_param_names)
    assert all("default" in getattr(mine, attribute) for attribute in mine.other_param_names)


def test_the_rank_of_an_adalora_layer() -> None:
    """That of its tensors, which a rank pattern cuts."""
    found: list[list[Any]] = [[], []]
    for which, library in enumerate((trimtab, peft)):
        model = quiet(
            library.get_peft_model, build("llama"), library.AdaLoraConfig(total_step=9, target_modules=["q_proj"])
        )
        path, one = next((path, m) for path, m in model.named_modules() if path.endswith("q_proj"))
        found[which].append(one.r["default"])
        key = path.removeprefix("base_model.model.") + ".lora_E"
        model.base_model.resize_modules_by_rank_pattern({key: [True] * 5 + [False] * 7}, "default")
        found[which].append(one.r["default"])
    assert found[0] == found[1] == [12, 5]


def test_a_module_trained_whole() -> None:
    found = []
    for library in (trimtab, peft):
        model = tuned(library, modules_to_save=["lm_head"])
        head = model.base_model.model.lm_head
        tensors = head.adapter_state_dict("default", head.state_dict())
        assert torch.equal(tensors["weight"], head.modules_to_save["default"].weight)
        assert head.unload_and_optionally_merge_module(True, False, None) is head.modules_to_save["default"]
        found.append(
            (head.adapter_layer_names, head.other_param_names, sorted(tensors), head.adapter_state_dict("x", {}))
        )
    assert found[0] == found[1]


def test_private_switches_of_a_layer() -> None:
    found: list[list[Any]] = [[], []]
    for which, library in enumerate((trimtab, peft)):
        torch.manual_seed(0)
        model = tuned(library, init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        model.add_adapter("other", library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        at, head, seen = q_proj(model), model.base_model.model.lm_head, found[which]
        x, ids = torch.ones(1, 3, at.in_features), torch.tensor([[1, 2]])
        seen += [at._active_adapter, at._disable_adapters, at._get_available_adapters(), head._get_available_adapters()]
        seen += [at._all_available_adapter_names(), head._disable_adapters, model._is_prompt_learning]
        at._disable_adapters = True
        seen += [torch.equal(at(x), at.base_layer(x)), at.disable_adapters]
        at._disable_adapters = False
        alone = at(x)
        at._active_adapter = ["default", "other"]
        assert at.active_adapters == ["default", "other"]
        assert not torch.equal(at(x), alone)
        at._active_adapter = "default"
        assert torch.equal(at(x), alone)
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        own = model.base_model_prepare_inputs_for_generation(ids)
        assert torch.equal(own["input_ids"], ids)
        model.requires_grad_(True)
        model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
        trained = [n for n, p in model.named_parameters() if p.requires_grad and "other" not in n]
        seen.append([n for n in trained if "lm_head" not in n])  # whose original peft lets train
        with torch.no_grad():
            before, inner = model(ids).logits, model.base_model
        merged = inner._unload_and_optionally_merge(merge=True)
        torch.testing.assert_close(merged(ids).logits, before)
    assert found[0] == found[1]


def test_what_is_active_is_a_list_at_layers() -> None:
    found = []
    for library in BOTH:
        model = adapt(library, "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
        model.add_adapter("other", library.LoraConfig(target_modules=["q_proj"]))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        seen = [layer.active_adapter, model.active_adapter]
        model.set_adapter("other")
        found.append([*seen, layer.active_adapter, model.active_adapter, layer.cast_input_dtype_enabled])
    assert found[0] == found[1] == [["default"], "default", ["other"], "other", True]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_eight_bit_floats_are_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    """Nothing can be computed, and no start drawn, in their own format: PEFT keeps it where it is not asked to upcast."""
    formats = []
    for library in BOTH:
        base = build("llama")
        layer = base.model.layers[0].self_attn.q_proj
        layer.weight = torch.nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
        config = library.LoraConfig(target_modules=[r"layers.0.self_attn.q_proj"])
        model = quiet(library.get_peft_model, base, config, autocast_adapter_dtype=autocast)
        formats.append({p.dtype for p in model.parameters() if p.requires_grad})
    ours, theirs = formats
    assert ours == {torch.float32}
    assert theirs == ({torch.float32} if autocast else {dtype})
