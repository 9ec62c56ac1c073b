"""Helpers of peft that other projects import although their names are private, against the installed peft's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.models import build
from tests.parity.pairs import BOTH, quiet
from tests.parity.test_parts import both

OTHER = "peft.utils.other"
MODELS = ["llama", "llama_tied", "gpt2", "bert"]


def outcome(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return f"refused: {error}"


def same(path: str, name: str, *calls: tuple[Any, ...]) -> None:
    ours, theirs = ([outcome(f, *args) for args in calls] for f in both(path, name))
    assert ours == theirs


def test_facts_of_a_call_and_of_models() -> None:
    two, four = torch.ones(2, 3), torch.ones(4, 3, 2)
    same(OTHER, "_get_batch_size", (two, None), (None, four), (two, four), (None, None))
    matches = [(k, t) for k in ("a.b", "xb", "a.b.c", "b") for t in ("b", "a.b", "c", "b.c", "a")]
    same(OTHER, "_is_valid_match", *matches)
    models = [(build(name),) for name in MODELS] + [(nn.Linear(2, 2),)]
    for name in ("_get_module_names_tied_with_embedding", "_get_no_split_modules"):
        same(OTHER, name, *models)
    same("peft.utils", "_get_input_embeddings_name", *models, (nn.Linear(2, 2), "other"))


def test_keys_and_mismatches() -> None:
    keys = ["a.lora_A.weight", "a.lora_B.bias", "a.lora_embedding_A", "x.weight", "b.modules_to_save.weight"]
    keys += ["lora_A.weight", "lora_magnitude_vector"]
    tensors = dict.fromkeys(keys, 1)
    same("peft.utils.save_and_load", "_insert_adapter_name_into_state_dict", (tensors, "own", "lora_"))
    layer, given = nn.Linear(2, 3), {"weight": torch.ones(4, 2), "bias": torch.ones(3), "more": torch.ones(1)}
    for ignore in (False, True):
        (mine, odd), (yours, different) = (
            f(layer, given, ignore) for f in both("peft.utils.save_and_load", "_find_mismatched_keys")
        )
        assert mine.keys() == yours.keys()
        assert odd == different


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wanted", ["all-linear", "ALL-LINEAR", ".*q_proj", ["q_proj"]])
def test_all_linear(name: str, wanted: Any) -> None:
    found = []
    for which, f in enumerate(both("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers")):
        config = BOTH[which].LoraConfig(target_modules=wanted)
        assert f(config, build(name)) is config
        found.append(config.target_modules)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_configs_of_prompts(name: str, model: str) -> None:
    fields = "num_layers token_dim num_attention_heads num_transformer_submodules encoder_hidden_size".split()
    found = []
    for which, f in enumerate(both(OTHER, "_prepare_prompt_learning_config")):
        config = getattr(BOTH[which], name)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        assert f(config, build(model).config.to_dict()) is config
        found.append([getattr(config, field) for field in fields if field in config.__dataclass_fields__])
        with pytest.raises(ValueError, match="num_layers"):
            f(getattr(BOTH[which], name)(num_virtual_tokens=3), {})
    assert found[0] == found[1]


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_freezing() -> None:
    results = []
    for which, freeze in enumerate(both(OTHER, "_freeze_adapter")):
        config = BOTH[which].LoraConfig(target_modules=["q_proj"])
        model = quiet(BOTH[which].get_peft_model, build("llama"), config)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        freeze(model, "default")
        results.append(trained(model))
    assert results[0] == results[1]
    for give in both(OTHER, "_set_layer_requires_grad"):
        layer, alone = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
        give(layer, False)
        give(alone, False)
        give(nn.Parameter(torch.ones(1)) * 2, True)
        assert not any(p.requires_grad for p in (*layer.parameters(), alone))


def test_modules_trained_whole() -> None:
    results: list[list[Any]] = [[], []]
    for which, (give, choose) in enumerate(
        zip(both(OTHER, "_set_trainable"), both(OTHER, "_set_adapter"), strict=True)
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
        seen = results[which]
        made = give(model, "first", ["1"], inference_mode=False)
        seen += [[m is model[1] for m in made], trained(model), model[1].active_adapters]
        made = give(model, "second", ["1"], inference_mode=False, activate_adapter=False)
        seen += [made, model[1].active_adapters, sorted(model[1].modules_to_save)]
        for name, frozen in (("second", False), ("unknown", False), ("first", True)):
            choose(model, name, inference_mode=frozen)
            seen += [[n for n in trained(model) if n.startswith("1")], model[1].active_adapters]
        with torch.no_grad():
            model[1].modules_to_save["first"].weight.zero_()
        seen.append(model(torch.ones(1, 2)).tolist())
        with pytest.raises(ValueError, match="Only one adapter"):
            choose(model, ["first", "second"])
        with pytest.raises(ValueError, match="not found in the base model"):
            give(model, "third", ["zz"], inference_mode=False, strict_module_check=True)
        assert give(model, "third", ["zz"], inference_mode=False) == []
    assert results[0] == results[1]


def test_rows_of_an_embedding_trained() -> None:
    results: list[list[Any]] = [[], []]
    for which, give in enumerate(both(OTHER, "_set_trainable")):
        model, wrapper = build("llama"), both(OTHER, "TrainableTokensWrapper")[which]
        model.requires_grad_(False)
        give(model, "own", ["embed_tokens"], inference_mode=False, wrapper_cls=wrapper, token_indices=[1, 3])
        results[which] += [len(trained(model)), sum(p.numel() for p in model.parameters() if p.requires_grad)]
    assert results[0] == results[1]


def test_what_is_added_to_a_weight_while_it_is_used() -> None:
    ours, theirs = (cls(torch.ones(2, 2)) for cls in both("peft.tuners.lora.layer", "_LoraParameterProxy"))
    W = torch.randn(2, 2)
    assert torch.equal(ours(W), theirs(W))
    assert [*ours.state_dict()] == [*theirs.state_dict()] == []


def test_the_mapping_of_transformers() -> None:
    ours, theirs = both("peft.utils.transformers_weight_conversion", "get_model_conversion_mapping")
    assert ours is theirs
