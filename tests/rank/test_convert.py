"""Any change of weights as a LoRA: exact at full rank, the best approximation below, for every method and layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.models import AttentionNet, ConvNet, assert_untouched, gpt2, llama, logits, mixtral, snapshot, tokens, toy
from tests.rank.adapters import dense, loaded, lora, stirred
from tests.rank.test_adapter_file import EXPERTS
from tests.rank.test_resize import best
from trimtab import convert_to_lora, save_as_lora
from trimtab.errors import ConfigError
from trimtab.rank.changes import changes

CASES: dict[str, Any] = {
    "loha": lambda: (toy, trimtab.LoHaConfig(r=2, target_modules=["up", "head", "conv", "down"])),
    "oft": lambda: (toy, trimtab.OFTConfig(oft_block_size=2, target_modules=["up", "down"])),
    "ia3": lambda: (toy, trimtab.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])),
    "vera": lambda: (toy, trimtab.VeraConfig(r=3, target_modules=["up"])),
    "adalora": lambda: (toy, trimtab.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["up", "head"])),
    "dora": lambda: (toy, trimtab.LoraConfig(r=2, use_dora=True, target_modules=["up", "embed", "conv"])),
    "lora": lambda: (toy, trimtab.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "embed", "scaled", "conv"])),
    "lora with biases": lambda: (toy, trimtab.LoraConfig(r=2, target_modules=["up", "head"], lora_bias=True)),
    "tokens": lambda: (toy, trimtab.TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 3])),
    "lora and tokens": lambda: (
        toy,
        trimtab.LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1]}),
    ),
    "head": lambda: (toy, trimtab.LoHaConfig(r=2, target_modules=["up"], modules_to_save=["head", "norm"])),
    "biases of the base": lambda: (toy, trimtab.LoraConfig(r=2, target_modules=["up"], bias="all")),
    "copies": lambda: (toy, trimtab.LNTuningConfig(target_modules=["up"])),
    "groups": lambda: (lambda: ConvNet(groups=2), trimtab.LoraConfig(r=4, target_modules=["one", "two"])),
    "attention": lambda: (AttentionNet, trimtab.LoraConfig(r=2, target_modules=["self_attn"])),
    "experts": lambda: (mixtral, trimtab.LoraConfig(r=2, **EXPERTS)),
    "conv1d": lambda: (gpt2, trimtab.LoHaConfig(r=2, target_modules=["c_attn", "c_fc"])),
    "some layers": lambda: (llama, trimtab.LoHaConfig(r=1, target_modules=["q_proj"], layers_to_transform=[1])),
    "an expression": lambda: (llama, trimtab.LoHaConfig(r=1, target_modules=r".*\.[qv]_proj")),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: Any) -> tuple[Any, Any]:
    """(the base anew, the model with a random adapter)."""
    base, config = request.param()

    def build() -> Any:
        torch.manual_seed(0)
        return base().eval()

    return build, stirred(trimtab.get_peft_model(build(), config))


def test_with_all_of_the_energy_it_computes_the_same(case: Any, tmp_path: Path) -> None:
    build, model = case
    save_as_lora(tmp_path, model, 1.0)
    again = loaded(tmp_path, build())
    assert again.peft_config["default"].peft_type == "LORA"
    ids = tokens(length=6, vocabulary=12)
    with torch.no_grad():
        wanted, change = logits(model, ids), (logits(model, ids) - logits(build(), ids)).abs().max()
        assert (logits(again, ids) - wanted).abs().max() < 1e-3 * change


def test_a_rank_is_the_best_approximation_of_each_layer(case: Any, tmp_path: Path) -> None:
    build, model = case
    rank = 2
    save_as_lora(tmp_path, model, rank)
    new = dense(loaded(tmp_path, build()))
    grouped = isinstance(build(), ConvNet)
    for path, D in dense(model).items():
        D = D.unflatten(0, (2, -1)) if grouped else D
        wanted = best(D, 1 if grouped else rank)
        assert (new[path].reshape(wanted.shape) - wanted).norm() < 1e-5 * wanted.norm(), path


def test_the_model_stays_as_it_is(case: Any) -> None:
    _, model = case
    before = snapshot(model)
    config, tensors = convert_to_lora(model, 0.9)
    assert_untouched(model, before)
    held = {id(p.untyped_storage()) for p in model.parameters()}
    assert not any(id(t.untyped_storage()) in held or t.requires_grad for t in tensors.values())
    assert config.lora_alpha == config.r


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_float_is_a_share_of_the_energy(share: float) -> None:
    model = stirred(trimtab.get_peft_model(toy(), trimtab.LoHaConfig(r=3, target_modules=["up", "head"])))
    config, tensors = convert_to_lora(model, share)
    for change in changes(model, "default"):
        S = torch.linalg.svdvals(change.delta()).square().detach()
        rank = int((S.cumsum(0) < share * S.sum()).sum()) + 1
        assert config.resolve(change.path).r == rank == len(tensors[f"base_model.model.{change.path}.lora_A.weight"])
        assert config.resolve(change.path).scaling() == 1


def test_what_the_config_says_comes_along(tmp_path: Path) -> None:
    config = trimtab.LoHaConfig(
        r=1, target_modules=["q_proj"], task_type="SEQ_CLS", base_model_name_or_path="a/base", revision="main"
    )
    from tests.models import classifier

    model = stirred(trimtab.get_peft_model(classifier(), config))
    save_as_lora(tmp_path, model, 1)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["task_type"] == "SEQ_CLS"
    assert (found["base_model_name_or_path"], found["revision"], found["inference_mode"]) == ("a/base", "main", True)
    assert "score" in found["modules_to_save"]
    assert found["target_modules"] == ["q_proj"]
    assert torch.allclose(loaded(tmp_path, classifier())(tokens()).logits, model(tokens()).logits, atol=1)


def test_one_of_several_adapters_active_or_not(tmp_path: Path) -> None:
    model = trimtab.get_peft_model(toy(), trimtab.LoraConfig(r=2, target_modules=["head"]), "first")
    model.add_adapter("other", trimtab.LoHaConfig(r=2, target_modules=["up"]))
    model.set_adapter("other")
    stirred(model)
    model.set_adapter("first")
    save_as_lora(tmp_path, model, 4, adapter_name="other")
    wanted = dense(model, "other")
    new = dense(loaded(tmp_path))
    assert new.keys() == {"up"}
    assert torch.allclose(new["up"], wanted["up"], atol=1e-5)


def test_progress_and_compilation_change_nothing(capsys: Any) -> None:
    model = stirred(trimtab.get_peft_model(toy(), trimtab.LoHaConfig(r=2, target_modules=["up", "head"])))
    plain = convert_to_lora(model, 2)[1]
    shown = convert_to_lora(model, 2, progressbar=True)[1]
    assert "100%" in capsys.readouterr().out
    compiled = convert_to_lora(model, 2, compile_kwargs={"backend": "eager"})[1]
    for key, tensor in plain.items():
        assert torch.equal(shown[key], tensor)
        assert torch.allclose(compiled[key], tensor, atol=1e-6)


def test_zeros_become_rank_one_of_zeros() -> None:
    config, tensors = convert_to_lora(trimtab.get_peft_model(toy(), trimtab.LoHaConfig(target_modules=["up"])), 0.9)
    assert config.r == 1
    assert not tensors["base_model.model.up.lora_B.weight"].any()


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, -0.5, True, "2", None])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank"):
        convert_to_lora(lora(), rank)


def test_a_rank_above_what_a_layer_can_have() -> None:
    model = lora(target_modules=["up", "head"])
    with pytest.raises(ConfigError, match=r"rank 7 is larger than '(up|head)' \(\d+, 6\)"):
        convert_to_lora(model, 7)


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (
            llama,
            trimtab.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "changes the weight of none",
        ),
        (llama, trimtab.LNTuningConfig(target_modules=["input_layernorm"]), "LNTuning at"),
    ],
)
def test_what_is_no_change_of_weights(base: Any, config: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        convert_to_lora(trimtab.get_peft_model(base(), config), 2)


def test_no_adapters_and_a_start_that_changed_the_base(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="No adapters"):
        convert_to_lora(toy(), 2)
    pissa = trimtab.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        convert_to_lora(trimtab.get_peft_model(toy(), pissa), 2)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        save_as_lora(tmp_path / "file", lora(), 2)


@pytest.mark.usefixtures("parked")
def test_what_can_be_converted_is_told_of_adapters_outside_the_module_tree() -> None:
    model = trimtab.get_peft_model(llama(), trimtab.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    for i in range(12):
        model.add_adapter(f"a{i}", trimtab.LoraConfig(r=2, target_modules=["q_proj"]))
    names = [f"a{i}" for i in range(12)]
    assert any(adapter.parked for adapter in model.graft.adapters.values())
    assert all(model.supports_lora_conversion(name) for name in ("first", *names))
    assert not model.supports_lora_conversion("nobody")
