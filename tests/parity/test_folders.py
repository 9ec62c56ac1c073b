"""Folders and state dicts: several adapters, resized vocabularies, converted starts, injected models, pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab
from tests.parity.models import VOCABULARY, batch, build, tensor_of
from tests.parity.pairs import (
    BOTH,
    adapt,
    config_file,
    config_of,
    copy_state,
    load,
    near,
    pair,
    parameters,
    quiet,
    run,
    spoken,
    stir,
    weights_file,
)
from trimtab.files.codec import IGNORED


def _meant(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the doubles PEFT writes, and with an embedding that another adapter adapts under its own key."""
    return {
        k.replace("embed_tokens.base_layer.weight", "embed_tokens.weight"): v
        for k, v in tensors.items()
        if not any(part in k for part in IGNORED)
    }


def same_folders(a: Path, b: Path, more: frozenset[str] = frozenset()) -> None:
    """The same files, the same configs, the same tensors; `more` are those that only the first has."""
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith("adapter_config.json"):
            assert config_file((a / name).parent) == config_file((b / name).parent)
        if name.endswith(".safetensors"):
            mine, other = (_meant(weights_file((root / name).parent)) for root in (a, b))
            assert mine.keys() - more == other.keys() - more
            for key, tensor in other.items():
                near(mine[key], tensor, 0)


SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"selected_adapters": ["default", "c"]},
    "one": {"selected_adapters": ["b"]},
    "pickled": {"safe_serialization": False},
    "with_embeddings": {"save_embedding_layers": True},
    "without_embeddings": {"save_embedding_layers": False},
    "not_main": {"is_main_process": False},
}


@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
def test_several_adapters(arguments: dict[str, Any], tmp_path: Path) -> None:
    """The layout of a folder with several adapters, and every adapter read back by both."""
    models = []
    for library in BOTH:
        model = adapt(library, "llama", {"task_type": "CAUSAL_LM"})
        for name, fields in (("b", {"r": 3}), ("c", {"target_modules": ["embed_tokens", "q_proj"]})):
            quiet(model.add_adapter, name, config_of(library, fields))
        for name in ("default", "b", "c"):
            model.set_adapter(name)
            stir(model)
        models.append(model)
    copy_state(models[1], models[0])
    roots = [tmp_path / "ours", tmp_path / "theirs"]
    for model, root in zip(models, roots, strict=True):
        quiet(model.save_pretrained, str(root), **arguments)
    if not arguments.get("is_main_process", True):
        assert not any(p.is_file() for p in roots[0].rglob("*"))
        return
    # Where one embedding is adapted, theirs leaves the other out although both are asked for.
    both = arguments.get("save_embedding_layers") is True
    same_folders(*roots, more=frozenset({"base_model.model.lm_head.weight"} if both else ()))
    if both:
        assert "base_model.model.lm_head.weight" in weights_file(roots[0] / "c")
        assert "base_model.model.lm_head.weight" not in weights_file(roots[1] / "c")
    for name in arguments.get("selected_adapters", ["default", "b", "c"]):
        models[1].set_adapter(name)
        wanted = run(models[1].eval(), "llama")
        for library in BOTH:
            for root in roots:
                folder = root if name == "default" else root / name
                near(run(load(library, "llama", folder), "llama"), wanted)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["model.embed_tokens"], "model.embed_tokens", None])
def test_trained_tokens_leave_the_embedding_out(targets: Any, tmp_path: Path) -> None:
    """The rows alone are saved, also where the embedding is named: it is what they spare the file."""
    for library, name in zip(BOTH, ("ours", "theirs"), strict=True):
        config = library.TrainableTokensConfig(token_indices=[3, 4], target_modules=targets)
        quiet(quiet(library.get_peft_model, build("llama"), config).save_pretrained, str(tmp_path / name))
    ours, theirs = (weights_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == {"base_model.model.model.embed_tokens.trainable_tokens_delta"}


def resized(library: Any, fields: dict[str, Any], size: int, base: Path) -> Any:
    model = build("llama")
    model.name_or_path = str(base)
    quiet(model.resize_token_embeddings, size)
    torch.manual_seed(2)
    with torch.no_grad():
        for getter in (model.get_input_embeddings, model.get_output_embeddings):
            getter().weight[VOCABULARY:].normal_()
    return quiet(library.get_peft_model, model, config_of(library, fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [41]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["plain", "saved", "tokens", "targeted"],
)
def test_resized_vocabulary(fields: dict[str, Any], tmp_path: Path) -> None:
    """A base whose vocabulary grew: its embeddings travel with the adapter, both ways."""
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    models = [resized(library, fields, VOCABULARY + 4, base) for library in BOTH]
    stir(models[1])
    copy_state(models[1], models[0])
    roots = [tmp_path / "ours", tmp_path / "theirs"]
    for model, root in zip(models, roots, strict=True):
        quiet(model.save_pretrained, str(root))
    lossy = "target_modules" in fields  # PEFT then forgets the head, whose new rows are random again after loading
    if not lossy:
        same_folders(*roots)
    wanted = run(models[1].eval(), "llama")
    near(run(models[0].eval(), "llama"), wanted)
    for library in BOTH:
        for root in roots[: 1 if lossy else 2]:
            model = build("llama")
            quiet(model.resize_token_embeddings, VOCABULARY + 4)
            again = quiet(library.PeftModel.from_pretrained, model, str(root))
            near(run(again, "llama"), wanted)


STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "r": 4}),
    "pissa_gpt2": ("gpt2", {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}),
    "olora": ("llama", {"init_lora_weights": "olora", "r": 4, "lora_alpha": 2}),
    "rslora": ("llama", {"init_lora_weights": "pissa", "r": 4, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "llama",
        {"init_lora_weights": "pissa", "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
}


@pytest.mark.parametrize(("name", "fields"), STARTS.values(), ids=STARTS)
def test_converted_start(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """An adapter whose start changed the base, saved as a plain LoRA for the base as it was."""
    models, roots = [], [tmp_path / "ours", tmp_path / "theirs"]
    for library, root in zip(BOTH, roots, strict=True):
        model = adapt(library, name, fields)
        model.peft_config["default"].init_lora_weights = True
        quiet(model.save_pretrained, str(root / "start"))
        model.peft_config["default"].init_lora_weights = fields["init_lora_weights"]
        stir(model)
        quiet(model.save_pretrained, str(root / "end"), path_initial_model_for_weight_conversion=str(root / "start"))
        models.append(model.eval())
    mine, other = (config_file(root / "end") for root in roots)
    assert mine == other
    files = [weights_file(root / "end") for root in roots]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    for model, root in zip(models, roots, strict=True):
        wanted = run(model, name)
        for library in BOTH:
            near(run(load(library, name, root / "end"), name), wanted, 5e-5)


def test_converted_start_faults(tmp_path: Path) -> None:
    """rsLoRA with patterns cannot be converted."""
    fields = {"init_lora_weights": "pissa", "r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    for library in BOTH:
        model = adapt(library, "llama", fields)
        quiet(model.save_pretrained, str(tmp_path))
        with pytest.raises(ValueError, match="rslora"):
            quiet(model.save_pretrained, str(tmp_path / "x"), path_initial_model_for_weight_conversion=str(tmp_path))


EMBEDDED: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied": ("llama_tied", {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}),
    "tied by the embedding": ("llama_tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "tied by an expression": ("llama_tied", {"target_modules": ".*(q_proj|lm_head)", "ensure_weight_tying": True}),
    "gpt2, tied": ("gpt2", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "gpt2, tied both": ("gpt2", {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}),
    "not tied": ("llama", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "tokens": ("llama_tied", {"target_modules": ["lm_head"], "trainable_token_indices": [1, 2]}),
    "tokens, expression": ("llama", {"target_modules": ".*(q_proj|lm_head)", "trainable_token_indices": [1, 2]}),
}


@pytest.mark.parametrize(("name", "fields"), EMBEDDED.values(), ids=EMBEDDED)
def test_which_embeddings_of_the_base_are_saved(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """By themselves, and why the model says it does so."""
    keys, said = [], []
    for library, folder in zip(BOTH, ("ours", "theirs"), strict=True):
        model = adapt(library, name, fields)
        texts = spoken(model.save_pretrained, str(tmp_path / folder))
        said.append(any("Setting `save_embedding_layers` to `True`" in text for text in texts))
        keys.append(weights_file(tmp_path / folder).keys())
    assert keys[0] == keys[1]
    assert said[0] == said[1]


@pytest.mark.parametrize("key", ["head", "tied", "tied both", "tokens"])
def test_a_tied_head_in_the_others_model(key: str, tmp_path: Path) -> None:
    """Either's file, with what is saved along or without, gives the same outputs in both."""
    name, fields = EMBEDDED[key]
    for library, folder in zip(BOTH, ("ours", "theirs"), strict=True):
        model = adapt(library, name, fields)
        stir(model)
        quiet(model.save_pretrained, str(tmp_path / folder))
        y = run(model.eval(), name)
        for reader in BOTH:
            near(run(load(reader, name, tmp_path / folder).eval(), name), y)


@pytest.mark.parametrize("fields", [{"ensure_weight_tying": True}, {"trainable_token_indices": [1, 2]}])
def test_a_head_whose_vocabulary_was_resized_is_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    """Beside tied pairs and trained tokens as well: the base has no such rows."""
    quiet(build("llama_tied").save_pretrained, str(tmp_path / "base"))
    model = build("llama_tied")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    quiet(model.resize_token_embeddings, model.config.vocab_size + 4)
    config = trimtab.LoraConfig(target_modules=["lm_head"], **fields)
    quiet(quiet(trimtab.get_peft_model, model, config).save_pretrained, str(tmp_path / "adapter"))
    assert "base_model.model.lm_head.base_layer.weight" in weights_file(tmp_path / "adapter")


STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "dora": ("toy", {"use_dora": True, "target_modules": ["embed", "plain", "conv"]}),
    "bias": ("bert", {"bias": "all"}),
    "lora_only": ("gpt2", {"bias": "lora_only"}),
    "save": ("llama", {"modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [1, 2]}),
    "tied_tokens": ("llama_tied", {"trainable_token_indices": [1, 2]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
}
each = pytest.mark.parametrize(("name", "fields"), STATES.values(), ids=STATES)


@each
@pytest.mark.parametrize("injected", [False, True], ids=["model", "injected"])
def test_state_dicts(name: str, fields: dict[str, Any], injected: bool) -> None:
    """Keys and values out of a model, given back to the other's; on PeftModels and on models with injected adapters."""
    models = []
    for library in BOTH:
        if injected:
            torch.manual_seed(0)
            models.append(quiet(library.inject_adapter_in_model, config_of(library, fields), build(name), "x"))
        else:
            models.append(adapt(library, name, fields, adapter_name="x"))
    stir(models[1])
    assert parameters(models[0]).keys() == parameters(models[1]).keys()
    states = [
        quiet(library.get_peft_model_state_dict, m, adapter_name="x") for library, m in zip(BOTH, models, strict=True)
    ]
    assert states[0].keys() == states[1].keys()
    result = quiet(trimtab.set_peft_model_state_dict, models[0], states[1], adapter_name="x")
    assert not result.unexpected_keys
    near(run(models[0].eval(), name), run(models[1].eval(), name))
    full = quiet(trimtab.get_peft_model_state_dict, models[0], state_dict=models[0].state_dict(), adapter_name="x")
    assert full.keys() == states[1].keys()
    stir(models[0])
    states[0] = quiet(trimtab.get_peft_model_state_dict, models[0], adapter_name="x")
    back = quiet(peft.set_peft_model_state_dict, models[1], states[0], adapter_name="x")
    assert not back.unexpected_keys
    near(run(models[0].eval(), name), run(models[1].eval(), name))


@each
def test_incompatible_keys(name: str, fields: dict[str, Any]) -> None:
    """What does not fit is reported alike."""
    results = []
    for library in BOTH:
        model = adapt(library, name, fields)
        state = dict(quiet(library.get_peft_model_state_dict, model))
        gone = sorted(k for k in state if "lora_A" in k or "lora_embedding_A" in k)[0]
        del state[gone]
        state["base_model.model.nothing.lora_A.weight"] = torch.zeros(2, 2)
        result = quiet(library.set_peft_model_state_dict, model, state)
        results.append(result)
    mine, other = results
    lost = {k for k in other.missing_keys if ("lora_" in k or "trainable_tokens" in k) and "lm_head" not in k}
    assert {k for k in mine.missing_keys if "lora_" in k or "trainable_tokens" in k} == lost
    assert len(mine.unexpected_keys) == len(other.unexpected_keys) == 1


def test_wrong_shapes() -> None:
    """A tensor of another shape is a RuntimeError, or left out on demand."""
    for library in BOTH:
        model = adapt(library, "llama", {})
        state = dict(quiet(library.get_peft_model_state_dict, adapt(library, "llama", {"r": 3})))
        with pytest.raises(RuntimeError, match="size mismatch"):
            quiet(library.set_peft_model_state_dict, model, state)
        quiet(library.set_peft_model_state_dict, model, state, ignore_mismatched_sizes=True)


def test_injected_from_state_dict() -> None:
    """`state_dict` says which modules are adapted."""
    source = adapt(peft, "llama", {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]})
    state = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(source).items()}
    models = [
        quiet(library.inject_adapter_in_model, library.LoraConfig(), build("llama"), state_dict=state)
        for library in BOTH
    ]
    assert parameters(models[0]).keys() == parameters(models[1]).keys()
    for library, model in zip(BOTH, models, strict=True):
        quiet(library.set_peft_model_state_dict, model, state)
    near(tensor_of(models[0](**batch("llama"))), tensor_of(models[1](**batch("llama"))))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["nothing"]},
    ],
    ids=["default", "less", "same", "more", "a layer", "excluded", "nothing"],
)
def test_injected_from_a_state_dict_that_is_not_the_configs(fields: dict[str, Any]) -> None:
    """The state dict wins; what the config names besides, or lacks, is told in PEFT's words."""
    source = adapt(peft, "llama", {"target_modules": ["q_proj", "k_proj"]})
    state = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(source).items()}
    models, said = [build("llama") for _ in BOTH], []
    for library, model in zip(BOTH, models, strict=True):
        texts = spoken(library.inject_adapter_in_model, library.LoraConfig(**fields), model, state_dict=state)
        said.append([text.strip() for text in texts if "While injecting" in text])
    assert said[0] == said[1]
    assert parameters(models[0]).keys() == parameters(models[1]).keys()


def test_status_of_injected_models() -> None:
    """A model of transformers is called by its class, any other is not."""
    for name in ("llama", "bert", "toy"):
        status = []
        for library in BOTH:
            model = build(name)
            config = library.LoraConfig(target_modules=["q_proj", "query", "plain"])
            quiet(library.inject_adapter_in_model, config, model)
            status.append(str(library.get_model_status(model)))
        assert status[0] == status[1]


def test_config_from_pretrained(tmp_path: Path) -> None:
    """The config alone, of either's file, and with overrides."""
    for library, name in zip(BOTH, ("ours", "theirs"), strict=True):
        quiet(
            adapt(
                library, "gpt2", {"r": 3, "task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}
            ).save_pretrained,
            str(tmp_path / name),
        )
    configs = [
        quiet(library.PeftConfig.from_pretrained, str(tmp_path / name))
        for library in BOTH
        for name in ("ours", "theirs")
    ]
    dicts = [
        json.loads(json.dumps(c.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
        for c in configs
    ]
    for found in dicts[1:]:
        assert {k: v for k, v in found.items() if k != "peft_type"} == {
            k: v for k, v in dicts[0].items() if k != "peft_type"
        }
    assert [type(c).__name__ for c in configs] == ["LoraConfig"] * 4
    assert trimtab.LoraConfig.from_pretrained(str(tmp_path / "theirs"), lora_alpha=99).lora_alpha == 99


def test_fields() -> None:
    """The config has PEFT's fields with PEFT's defaults."""
    mine, other = (library.LoraConfig().to_dict() for library in BOTH)
    assert mine.keys() == other.keys()
    assert {k: v for k, v in mine.items() if k != "peft_type"} == {k: v for k, v in other.items() if k != "peft_type"}


def test_model_card(tmp_path: Path) -> None:
    """The front matter of the README."""
    import yaml

    fronts = []
    for library, name in zip(BOTH, ("ours", "theirs"), strict=True):
        model = build("llama")
        model.name_or_path = model.config._name_or_path = "somebody/something"
        adapted = quiet(library.get_peft_model, model, library.LoraConfig(task_type="CAUSAL_LM"))
        quiet(adapted.save_pretrained, str(tmp_path / name))
        text = (tmp_path / name / "README.md").read_text()
        fronts.append(yaml.safe_load(text.split("---")[1]))
        assert "### Framework versions\n\n- PEFT 0.21.2" in text
    fronts[0]["tags"].sort()
    fronts[1]["tags"].sort()
    assert fronts[0] == fronts[1]


def test_half_trained_pair(tmp_path: Path) -> None:
    """A bf16 base: the file holds the adapter in fp32, and reads back so."""
    ours, theirs = pair("llama", {}, torch.bfloat16)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        quiet(model.save_pretrained, str(tmp_path / name))
    same_folders(tmp_path / "ours", tmp_path / "theirs")
    for library in BOTH:
        again = load(library, "llama", tmp_path / "theirs", torch.bfloat16)
        assert {p.dtype for n, p in again.named_parameters() if "lora_" in n} == {torch.float32}


def test_a_second_injection_is_told_of() -> None:
    """Of any method; a PeftModel's own `add_adapter` is meant to add one, and says nothing."""
    for library in BOTH:
        model, inject = build("llama"), library.inject_adapter_in_model
        assert spoken(inject, config_of(library, {}), model, "first") == []
        for name, config in (
            ("second", config_of(library, {"target_modules": ["o_proj"]})),
            ("third", library.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
        ):
            said = spoken(inject, config, model, name)
            assert [text[:45] for text in said] == ["Already found a `peft_config` attribute in th"]
        assert spoken(adapt(library, "llama", {}).add_adapter, "second", config_of(library, {})) == []
