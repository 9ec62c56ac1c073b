"""What is active, trainable, merged and in training mode after each call, and how it is reported, as in PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.models import build
from tests.parity.pairs import (
    BOTH,
    adapt,
    config_of,
    copy_state,
    load,
    near,
    quiet,
    run,
    stir,
    trainable,
)

Step = Callable[[Any, Any, Path], Any]  # (library, model, folder of saved adapters) -> the model if it is a new one


def add(name: str, **fields: Any) -> Step:
    return lambda library, model, folder: model.add_adapter(name, config_of(library, fields))


def call(method: str, *args: Any, **kwargs: Any) -> Step:
    return lambda library, model, folder: getattr(model, method)(*args, **kwargs) and None


def tuner(method: str, *args: Any, **kwargs: Any) -> Step:
    return lambda library, model, folder: getattr(model.base_model, method)(*args, **kwargs) and None


def read(name: str, **kwargs: Any) -> Step:
    return lambda library, model, folder: model.load_adapter(str(folder), name, **kwargs) and None


def fresh(**kwargs: Any) -> Step:
    return lambda library, model, folder: load(library, "llama", folder, **kwargs)


SAVE = {"modules_to_save": ["lm_head"]}
TOKENS = {"trainable_token_indices": [1, 2]}
OTHER = {"target_modules": ["k_proj", "q_proj"], "r": 4}

SEQUENCES: dict[str, tuple[dict[str, Any], list[Step]]] = {
    "add": ({}, [add("b"), add("c", **OTHER)]),
    "add_frozen": ({"inference_mode": True}, [add("b", inference_mode=True)]),
    "set": ({}, [add("b"), call("set_adapter", "b"), call("set_adapter", "default")]),
    "set_inference": ({}, [add("b"), call("set_adapter", "b", inference_mode=True), call("set_adapter", "default")]),
    "set_frozen": ({}, [add("b", inference_mode=True), call("set_adapter", "b"), call("set_adapter", "default")]),
    "set_other_targets": ({}, [add("b", **OTHER), call("set_adapter", "b")]),
    "several": ({}, [add("b"), add("c", **OTHER), tuner("set_adapter", ["default", "b"]), tuner("set_adapter", ["c"])]),
    "several_inference": ({}, [add("b"), tuner("set_adapter", ["default", "b"], inference_mode=True)]),
    "delete": ({}, [add("b"), call("delete_adapter", "b")]),
    "delete_active": ({}, [add("b"), add("c"), call("delete_adapter", "default")]),
    "delete_one_of_several": ({}, [add("b"), tuner("set_adapter", ["default", "b"]), call("delete_adapter", "b")]),
    "requires_grad": (
        {},
        [add("b"), call("set_requires_grad", "b"), call("set_requires_grad", ["default", "b"], False)],
    ),
    "load": ({}, [read("b"), call("set_adapter", "b")]),
    "load_trainable": ({}, [read("b", is_trainable=True), call("set_adapter", "b")]),
    "from_pretrained": ({}, [fresh(), read("b"), call("set_adapter", "b"), call("set_adapter", "default")]),
    "from_pretrained_trainable": ({}, [fresh(is_trainable=True), read("b"), call("set_adapter", "b")]),
    "from_pretrained_both": ({}, [fresh(is_trainable=True), read("b", is_trainable=True), call("set_adapter", "b")]),
    "from_pretrained_named": ({}, [fresh(adapter_name="x"), add("y"), call("set_adapter", "y")]),
    "save": (SAVE, [add("b", **SAVE), call("set_adapter", "b"), call("delete_adapter", "b")]),
    "save_one": (SAVE, [add("b"), call("set_adapter", "b"), call("set_adapter", "default")]),
    "tokens": (TOKENS, [add("b", **TOKENS), call("set_adapter", "b"), call("set_adapter", "default")]),
    "merge": ({}, [add("b"), call("merge_adapter"), call("unmerge_adapter"), call("merge_adapter", ["b"])]),
    "merge_several": (
        {},
        [add("b"), tuner("set_adapter", ["default", "b"]), call("merge_adapter"), call("unmerge_adapter")],
    ),
    "modes": ({}, [call("eval"), add("b"), call("train"), read("c")]),
    "dora": ({"use_dora": True}, [add("b", use_dora=True), call("set_adapter", "b")]),
    "biases": (
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        [add("b"), call("set_adapter", "b"), call("set_adapter", "default")],
    ),
}


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a caller can ask about the state."""
    status = dataclasses.asdict(model.get_model_status())
    status["merged_adapters"].sort()
    modes = {
        n: m.training for n, m in model.named_modules() if n.endswith(("q_proj", "lora_A.default", "model", "mlp"))
    }
    return {
        "active": model.active_adapters,
        "trainable": trainable(model),
        "counts": model.get_nb_trainable_parameters(),
        "status": status,
        "layers": [dataclasses.asdict(row) for row in model.get_layer_status()],
        "modes": modes,
        "configs": list(model.peft_config),
        "frozen": {n: c.inference_mode for n, c in model.peft_config.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter saved by PEFT."""
    import peft

    model = adapt(peft, "llama", {})
    stir(model)
    path = tmp_path_factory.mktemp("saved")
    quiet(model.save_pretrained, str(path))
    return path


@pytest.mark.parametrize(("fields", "steps"), SEQUENCES.values(), ids=SEQUENCES)
def test_sequence(fields: dict[str, Any], steps: list[Step], folder: Path) -> None:
    """After every call of a sequence, both report the same state and compute the same."""
    ours, theirs = (adapt(library, "llama", fields) for library in BOTH)
    for step in [None, *steps]:
        if step is not None:
            ours = quiet(step, BOTH[0], ours, folder) or ours
            theirs = quiet(step, BOTH[1], theirs, folder) or theirs
        mine, other = snapshot(ours), snapshot(theirs)
        for key, value in other.items():
            assert mine[key] == value, key
    if not any(s["merged_adapters"] for s in [snapshot(theirs)["status"]]):
        copy_state(theirs, ours)
        near(run(ours.eval(), "llama"), run(theirs.eval(), "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_seq", "t5", "toy"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"r": 4, "modules_to_save": ["lm_head"]}, {"bias": "all"}, {"inference_mode": True}],
    ids=["plain", "save", "bias", "frozen"],
)
def test_print(name: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The line of `print_trainable_parameters`."""
    if name == "toy":
        fields = {**fields, "target_modules": ["embed", "plain", "biased", "conv"]}
    for library in BOTH:
        adapt(library, name, fields).print_trainable_parameters()
    mine, other = capsys.readouterr().out.splitlines()
    assert mine == other


def test_seed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 at its real size, as in PEFT's own documentation."""
    import transformers

    import trimtab

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert trimtab.LoraConfig().r == 8
    model.tie_weights()
    total = sum(p.numel() for p in model.parameters())
    quiet(trimtab.get_peft_model, model, trimtab.LoraConfig()).print_trainable_parameters()
    assert total == 124_439_808
    assert capsys.readouterr().out == "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364\n"


CLASSES = {
    "CAUSAL_LM": ("llama", "PeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("t5", "PeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("bert_seq", "PeftModelForSequenceClassification"),
    "TOKEN_CLS": ("bert_token", "PeftModelForTokenClassification"),
    "QUESTION_ANS": ("bert_qa", "PeftModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("bert", "PeftModelForFeatureExtraction"),
    None: ("llama", "PeftModel"),
}


@pytest.mark.parametrize(("task", "row"), CLASSES.items(), ids=map(str, CLASSES))
def test_classes(task: str | None, row: tuple[str, str]) -> None:
    """The class, its attributes and the heads it trains."""
    name, cls = row
    models = [adapt(library, name, {"task_type": task}) for library in BOTH]
    for model in models:
        assert type(model).__name__ == cls
        assert type(model.base_model).__name__ == "LoraModel"
    ours, theirs = models
    for attribute in (
        "active_adapter",
        "active_adapters",
        "modules_to_save",
        "base_model_torch_dtype",
        "has_active_enabled_adapter",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.peft_type.value == theirs.peft_type.value
    assert sorted(ours.targeted_module_names) == sorted(theirs.targeted_module_names)
    for attribute in ("base_model_name_or_path", "task_type", "inference_mode", "target_modules"):
        assert getattr(ours.active_peft_config, attribute) == getattr(theirs.active_peft_config, attribute), attribute
    assert type(ours.get_base_model()) is type(theirs.get_base_model()) is type(build(name))
    assert dict(ours.named_modules()).keys() >= {
        n for n in dict(theirs.named_modules()) if "lora_" in n and n.endswith("default") and "dropout" not in n
    }


def test_disable() -> None:
    """Inside the block: the base's output; after it: the state there was."""
    base = run(build("llama").eval(), "llama")
    for library in BOTH:
        model = adapt(library, "llama", {"modules_to_save": ["lm_head"]}).eval()
        stir(model)
        before, names = run(model, "llama"), trainable(model)
        with model.disable_adapter():
            near(run(model, "llama"), base, 0)
        near(run(model, "llama"), before, 0)
        assert trainable(model) == names


def test_layers() -> None:
    """What other libraries read and write on a layer."""
    layers = []
    for library in BOTH:
        model = adapt(library, "llama", {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1})
        stir(model)
        layers.append(model.base_model.model.model.layers[0].self_attn.q_proj)
    ours, theirs = layers
    copy_state(theirs, ours)
    assert dict(ours.r) == dict(theirs.r)
    assert dict(ours.lora_alpha) == dict(theirs.lora_alpha)
    assert dict(ours.scaling) == dict(theirs.scaling)
    assert ours.active_adapters == theirs.active_adapters
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
    for change in (
        lambda x: x.set_scale("default", 0.5),
        lambda x: x.scale_layer(3),
        lambda x: x.unscale_layer(2),
        lambda x: x.unscale_layer(),
        lambda x: x.scaling.__setitem__("default", 0.7),
    ):
        for layer in layers:
            change(layer)
        assert dict(ours.scaling) == dict(theirs.scaling)
        near(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    x = torch.randn(2, 16)
    for layer in layers:
        layer.eval()
    near(ours(x), theirs(x))
