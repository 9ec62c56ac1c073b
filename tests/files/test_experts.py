"""Experts that transformers 5 keeps in a few parameters: former names, "all-linear", former files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import logits
from trimtab import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from trimtab.errors import AdapterFileError, ConfigError, NoMatchingPeftModuleError, PeftWarning

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 3, "num_local_experts": 3, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "moe_k": 2, "moe_topk": 2, "head_dim": 4,
}  # fmt: skip
GROUPED = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

# Model type: sizes of its own, the former names (gate, up, down), and where one expert's layers were in layer {l}.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "mixtral": ({}, ("w1", "w3", "w2"), "model.layers.{l}.block_sparse_moe.experts.{e}"),
    "phimoe": ({}, ("w1", "w3", "w2"), "model.layers.{l}.block_sparse_moe.experts.{e}"),
    "minimax_m2": ({}, ("w1", "w3", "w2"), "model.layers.{l}.block_sparse_moe.experts.{e}"),
    "olmoe": ({}, GATE_UP_DOWN, "model.layers.{l}.mlp.experts.{e}"),
    "qwen2_moe": (
        {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1},
        GATE_UP_DOWN,
        "model.layers.{l}.mlp.experts.{e}",
    ),
    "qwen3_moe": ({}, GATE_UP_DOWN, "model.layers.{l}.mlp.experts.{e}"),
    "glm4_moe": (GROUPED, GATE_UP_DOWN, "model.layers.{l}.mlp.experts.{e}"),
    "deepseek_v2": (
        {**GROUPED, **LATENT, "num_key_value_heads": 4},
        GATE_UP_DOWN,
        "model.layers.{l}.mlp.experts.{e}",
    ),
    "ernie4_5_moe": ({"moe_layer_start_index": 1}, GATE_UP_DOWN, "model.layers.{l}.mlp.experts.{e}"),
    "jamba": (
        {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        GATE_UP_DOWN,
        "model.layers.{l}.feed_forward.experts.{e}",
    ),
    "nemotron_h": (
        {**GROUPED, "layers_block_type": ["attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 8,
         "n_groups": 1, "ssm_state_size": 4, "moe_shared_expert_intermediate_size": 12},
        ("", "up_proj", "down_proj"),
        "backbone.layers.{l}.mixer.experts.{e}",
    ),
}  # fmt: skip
# Families in which names of today's layers (shared experts, dense layers) are the former ones of experts too.
SHARING = ("qwen2_moe", "jamba", "nemotron_h")
DENSE = ("glm4_moe", "deepseek_v2", "ernie4_5_moe")
IDS = torch.arange(3, 15).view(2, 6)


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    own = FAMILIES[name][0] if name in FAMILIES else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **own, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def stacks(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> its experts."""
    return {int(n.split(".")[2]): m for n, m in model.named_modules() if n.endswith(".experts")}


def adapt(name: str, **fields: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(name), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **fields)).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


def trained(model: nn.Module) -> set[str]:
    """The modules that are adapted, without what differs from layer to layer."""
    keys = {n.partition(".lora_A")[0] for n, p in model.named_parameters() if ".lora_A" in n and p.requires_grad}
    return {key.partition("layers.")[2].partition(".")[2] for key in keys}


def experts(model: nn.Module) -> set[str]:
    return {n for n in trained(model) if ".experts" in n}


def says(run: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return " ".join(str(w.message) for w in caught if isinstance(w.message, PeftWarning))


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_adapts_the_experts_forward_as_merged_and_through_a_file(name: str, tmp_path: Path) -> None:
    said = says(lambda: get_peft_model(build(name), LoraConfig(target_modules="all-linear")))
    assert "The experts of this model are parameters" in said
    assert "The routers are left alone." in said
    model = adapt(name, target_modules="all-linear")
    assert len(experts(model)) == 2, "gate and up (or up alone), and down"
    assert not any("router" in n or n.rpartition(".")[2] in ("gate", "wg") for n in trained(model))
    expected = logits(model, IDS)
    assert not torch.allclose(expected, logits(build(name), IDS), atol=1e-4)
    model.save_pretrained(tmp_path)
    said = says(lambda: PeftModel.from_pretrained(build(name), tmp_path))
    assert "The experts" not in said, "the file speaks of today's parameters"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(name), tmp_path), IDS), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model.unload(), IDS), logits(build(name), IDS))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in SHARING])
@pytest.mark.parametrize("form", ["list", "expression"])
def test_former_names_mean_the_experts(name: str, form: str) -> None:
    names = FAMILIES[name][1]
    wanted = list(names) if form == "list" else rf".*\.({'|'.join(names)})"
    model = adapt(name, target_modules=wanted)
    assert len(experts(model)) == 2
    assert trained(model) == experts(model)
    config = model.peft_config["default"]
    assert set(config.target_parameters) == {"gate_up_proj", "down_proj"}
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 12}
    shapes = {n.partition("experts.")[2]: tuple(p.shape) for n, p in model.named_parameters() if ".lora_A" in n}
    count = len(next(iter(stacks(build(name)).values())).down_proj)
    assert shapes["base_layer.lora_A.default.weight"][0] == 4 * count
    assert shapes["lora_A.default.weight"][0] == 2 * count
    said = says(lambda: get_peft_model(build(name), LoraConfig(target_modules=wanted)))
    assert ("are left out, as in PEFT" in said) == (name in DENSE)


@pytest.mark.parametrize("name", SHARING)
def test_names_that_layers_of_today_have_mean_these_and_the_rest_is_said(name: str) -> None:
    wanted = [n for n in FAMILIES[name][1] if n]
    model = adapt(name, target_modules=wanted)
    assert not experts(model)
    assert trained(model)
    said = says(lambda: get_peft_model(build(name), LoraConfig(target_modules=wanted)))
    assert "The experts' parameters" in said
    assert "are left out: to adapt them, name them in `target_parameters`" in said
    both = adapt(name, target_modules=wanted, target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    assert len(experts(both)) >= 1


def test_a_longer_name_means_what_it_says() -> None:
    assert trained(adapt("glm4_moe", target_modules=["shared_experts.gate_proj"])) == {"mlp.shared_experts.gate_proj"}
    one = adapt("olmoe", target_modules=["layers.1.mlp.experts.0.down_proj", "q_proj"])
    assert one.peft_config["default"].target_parameters == {"model.layers.1.mlp.experts.down_proj"}
    assert [n for n, _ in one.named_parameters() if "experts.lora_A" in n] == [
        "base_model.model.model.layers.1.mlp.experts.lora_A.default.weight"
    ]


def test_layers_and_exclusions_hold_for_experts_too() -> None:
    first = adapt("olmoe", target_modules=["down_proj"], layers_to_transform=[0])
    assert first.peft_config["default"].target_parameters == {"model.layers.0.mlp.experts.down_proj"}
    assert experts(adapt("olmoe", target_modules="all-linear", exclude_modules=["down_proj"])) == {"mlp.experts"}
    with pytest.raises(ConfigError, match="names 'gate_proj' without 'up_proj': in this model both are one parameter"):
        adapt("olmoe", target_modules=["gate_proj", "down_proj"])


def test_ranks_of_former_names_become_those_of_the_parameters() -> None:
    fields = {"rank_pattern": {"gate_proj": 3, "up_proj": 1, "down_proj": 4}}
    config = adapt("olmoe", target_modules=list(GATE_UP_DOWN), **fields, alpha_pattern={"gate_proj": 9, "up_proj": 3})
    found = config.peft_config["default"]
    assert (found.rank_pattern[r".*\.gate_up_proj"], found.alpha_pattern[r".*\.gate_up_proj"]) == (4, 12)
    assert found.rank_pattern[r".*\.down_proj"] == 4
    with pytest.raises(ConfigError, match="different scales"):
        adapt("olmoe", target_modules=list(GATE_UP_DOWN), **fields)


def test_experts_that_no_layer_is_known_for_are_said_to_be_left_out() -> None:
    for name in ("gpt_oss", "granitemoe"):
        said = says(lambda n=name: get_peft_model(build(n), LoraConfig(target_modules="all-linear")))  # type: ignore[misc]
        assert "The experts' parameters ['down_proj', 'gate_up_proj'] are left out: to adapt them, name them in" in said
        config = LoraConfig(target_modules="all-linear", target_parameters=["down_proj", "gate_up_proj"])
        assert "left out" not in says(lambda n=name, c=config: get_peft_model(build(n), c))  # type: ignore[misc]
    said = says(lambda: get_peft_model(build("gpt_oss"), LoraConfig(target_modules=["gate_proj", "q_proj"])))
    assert "The experts' parameters" in said
    assert not says(lambda: get_peft_model(build("gpt_oss"), LoraConfig(target_modules=["q_proj"])))


def test_a_method_for_layers_only_says_that_it_leaves_experts_out() -> None:
    said = says(lambda: get_peft_model(build("olmoe"), LoHaConfig(target_modules="all-linear")))
    assert "The experts' parameters ['down_proj', 'gate_up_proj'] are left out: this method adapts layers only" in said
    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(build("olmoe"), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))


def test_a_model_without_experts_is_no_concern_of_transformers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models import llama
    from trimtab.files import conversion

    monkeypatch.setattr(conversion, "transforms", lambda model: 1 / 0)
    get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    get_peft_model(
        llama(), LoraConfig(target_modules=["self_attn.q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3})
    )


# ---------------------------------------------------------------------- files
def former_file(folder: Path, name: str, config: dict[str, Any], but: tuple[str, ...] = (), r: int = 2) -> Any:
    """Write a file as PEFT wrote it under transformers 4; returns the model with its deltas in the weights."""
    _, names, place = FAMILIES[name]
    draw = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    model = build(name)
    s = config.get("lora_alpha", 8) / (r**0.5 if config.get("use_rslora") else r)

    def pair(key: str, W: Tensor) -> None:
        out, into = W.shape
        A, B = torch.randn(r, into, generator=draw) * 0.3, torch.randn(out, r, generator=draw) * 0.3
        tensors[f"base_model.model.{key}.lora_A.weight"], tensors[f"base_model.model.{key}.lora_B.weight"] = A, B
        W += s * B @ A

    with torch.no_grad():
        for layer, module in stacks(model).items():
            for expert in range(len(module.down_proj)):
                path = place.format(l=layer, e=expert)
                gate, up, down = names
                fused = module.gate_up_proj[expert] if gate else module.up_proj[expert]
                rows = fused.chunk(2) if gate else (None, fused)
                for linear, W in zip((gate, up, down), (*rows, module.down_proj[expert])):
                    if linear and linear not in but:
                        pair(f"{path}.{linear}", W)
        for path, module in model.named_modules():
            last, wanted = path.rpartition(".")[2], config["target_modules"]
            if isinstance(module, nn.Linear) and (last != "lm_head" if wanted == "all-linear" else last in wanted):
                pair(path, module.weight)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, **config}))
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_files_of_transformers_4_load_whole(name: str, how: str, tmp_path: Path) -> None:
    """Experts, shared experts and dense layers alike."""
    names = [n for n in FAMILIES[name][1] if n]
    merged = former_file(tmp_path, name, {"target_modules": [*names, "q_proj"], "lora_alpha": 6, "lora_dropout": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "from_pretrained":
            model = PeftModel.from_pretrained(build(name), tmp_path)
        else:
            model = get_peft_model(build(name), LoraConfig(target_modules=["o_proj"]))
            assert model.load_adapter(tmp_path, "other") == ([], [])
            model.set_adapter("other", inference_mode=True)
    torch.testing.assert_close(logits(model, IDS), logits(merged, IDS), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), logits(merged, IDS), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "again", selected_adapters=model.active_adapters)
    again = tmp_path / "again" / ("" if how == "from_pretrained" else "other")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(name), again), IDS), logits(model, IDS))


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_former_files_of_all_linear_rslora_and_some_of_the_projections(name: str, tmp_path: Path) -> None:
    gate, up, down = FAMILIES[name][1]
    for i, (config, but) in enumerate(
        [
            ({"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5}, ()),
            ({"target_modules": [down]}, (gate, up)),
            ({"target_modules": [gate, up], "use_rslora": True}, (down,)),
            ({"target_modules": rf".*\.experts\.\d+\.({gate}|{up}|{down})"}, ()),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        merged = former_file(folder, name, config, but)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(build(name), folder)
        torch.testing.assert_close(logits(loaded, IDS), logits(merged, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe", "jamba"])
def test_a_file_without_experts_adapts_none(name: str, tmp_path: Path) -> None:
    """What PEFT writes under transformers 5 where it takes the names for today's layers alone."""
    names = list(FAMILIES[name][1])
    merged = former_file(tmp_path, name, {"target_modules": names}, but=tuple(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = PeftModel.from_pretrained(build(name), tmp_path)
    assert not experts(model)
    torch.testing.assert_close(logits(model, IDS), logits(merged, IDS), rtol=1e-4, atol=1e-4)


def test_experts_that_a_file_says_nothing_of_are_not_adapted(tmp_path: Path) -> None:
    """A config that named one expert: under transformers 4 the others stayed as they were."""
    former_file(tmp_path, "olmoe", {"target_modules": ["experts.0.down_proj"]}, but=("gate_proj", "up_proj"))
    path = tmp_path / "adapter_model.safetensors"
    some = {k: v for k, v in load_file(path).items() if ".experts.0." in k}
    save_file(some, path, metadata={"format": "pt"})
    merged = build("olmoe")
    with torch.no_grad():
        for layer, module in stacks(merged).items():
            key = f"base_model.model.model.layers.{layer}.mlp.experts.0.down_proj"
            module.down_proj[0] += 4 * some[f"{key}.lora_B.weight"] @ some[f"{key}.lora_A.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(build("olmoe"), tmp_path)
    torch.testing.assert_close(logits(model, IDS), logits(merged, IDS), rtol=1e-4, atol=1e-4)


PLACE = "base_model.model.model.layers.0.mlp.experts"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "one factor of one expert is gone": lambda values: values.pop(f"{PLACE}.0.up_proj.lora_A.weight"),
    "a shape of another rank": lambda values: values.update({f"{PLACE}.1.up_proj.lora_B.weight": torch.zeros(3)}),
    "a shape": lambda values: values.update({f"{PLACE}.1.down_proj.lora_A.weight": torch.zeros(5, 20)}),
    "no expert has one factor": lambda values: [values.pop(k) for k in list(values) if "up_proj.lora_B" in k],
    "one projection is gone": lambda values: [values.pop(k) for k in list(values) if "up_proj" in k],
    "another rank throughout": lambda values: values.update(
        {k: v[:1] for k, v in values.items() if "down_proj.lora_A" in k}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_experts(damage: str, tmp_path: Path) -> None:
    former_file(tmp_path, "olmoe", {"target_modules": list(GATE_UP_DOWN)})
    path = tmp_path / "adapter_model.safetensors"
    values = load_file(path)
    DAMAGE[damage](values)
    save_file(values, path, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match=str(tmp_path)):
            PeftModel.from_pretrained(build("olmoe"), tmp_path)
