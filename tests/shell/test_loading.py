"""What loading gives back and keeps, and what is said of files that do not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.contract.cases import move
from tests.models import assert_untouched, gpt2, llama, logits, snapshot, tokens, toy
from trimtab import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from trimtab.errors import AdapterFileError, ConfigError, NoMatchingPeftModuleError, PeftError
from trimtab.files.store import WEIGHTS

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = tokens()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(toy(), CONFIG).eval()
    move(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---------------------------------------------------------------------- what load_adapter gives back
def test_load_adapter_reports_what_it_loaded(folder: Path) -> None:
    model = get_peft_model(toy(), CONFIG)
    result = model.load_adapter(folder, "other")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    values = load_file(folder / WEIGHTS)
    del values["base_model.model.up.lora_A.weight"]
    save_file({**values, "base_model.model.nowhere.lora_A.weight": torch.zeros(1)}, folder / WEIGHTS)
    for name in ("third", "other"):  # a new one, and into one that is there
        result = model.load_adapter(folder, name, strict=False)
        assert result.missing_keys == [f"base_model.model.up.lora_A.{name}.weight"]
        assert result.unexpected_keys == ["base_model.model.nowhere.lora_A.weight"]


# ---------------------------------------------------------------------- the caller's config
def test_the_config_that_is_passed_is_the_adapters_own(folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["up", "head"], lora_alpha=4)
    model = PeftModel.from_pretrained(toy(), folder, config=config)
    assert model.peft_config["default"] is config
    assert model.active_peft_config is config
    assert config.inference_mode is True
    trained = PeftModel.from_pretrained(toy(), folder, config=config, is_trainable=True)
    assert trained.peft_config["default"] is config
    assert config.inference_mode is False
    scaling = trained.base_model.model.up.scaling["default"]
    assert scaling == 2


def test_a_config_that_fails_is_as_it_was(folder: Path) -> None:
    config = LoraConfig(r=3, target_modules=["up", "head"])
    before = config.copy()
    base = toy()
    was = snapshot(base)
    with pytest.raises(AdapterFileError, match="size mismatch"):
        PeftModel.from_pretrained(base, folder, config=config)
    assert config == before
    assert_untouched(base, was)
    with pytest.raises(ConfigError, match="The input config must be a PeftConfig, got <class 'dict'>"):
        PeftModel.from_pretrained(toy(), folder, config={"r": 2})  # type: ignore[arg-type]


def test_a_config_that_changes_in_training_is_one(tmp_path: Path) -> None:
    """AdaLoRA notes in its config what it cut: in the caller's object, which its formulas read."""
    config = AdaLoraConfig(target_modules=["up"], init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2)
    get_peft_model(toy(), config).save_pretrained(tmp_path)
    mine = PeftConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(toy(), tmp_path, config=mine, is_trainable=True)
    for step in range(1, 10):
        model(IDS).square().sum().backward()
        model.base_model.update_and_allocate(step)
    assert mine.rank_pattern
    assert all(m.options is mine for m in model.graft.adapters["default"].methods)


def test_sub_configs_and_prompts_keep_the_object_too(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(gpt2(), config).save_pretrained(tmp_path)
    mine = PeftConfig.from_pretrained(tmp_path)
    assert PeftModel.from_pretrained(gpt2(), tmp_path, config=mine).peft_config["default"] is mine


# ---------------------------------------------------------------------- errors name the folder
BROKEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ConfigError, "positive integer"),
    ({"r": "2"}, ConfigError, "`r` should be a whole number"),
    ({"target_modules": ["nowhere"]}, NoMatchingPeftModuleError, "not found in the base model"),
    ({"target_modules": "up"}, AdapterFileError, "unexpected keys"),
    ({"bias": "most"}, ConfigError, "`bias` should be one of"),
    ({"megatron_config": {"a": 1}}, NotImplementedError, "`megatron_config="),
    ({"init_lora_weights": "magic"}, ConfigError, "magic"),
    ({"modules_to_save": ["embed"], "target_modules": ["embed"]}, NoMatchingPeftModuleError, "excluded"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize(("fields", "error", "said"), BROKEN, ids=[str(f) for f, _, _ in BROKEN])
def test_what_is_wrong_with_a_file_is_said_with_its_name(
    fields: dict[str, Any], error: type[Exception], said: str, how: str, folder: Path
) -> None:
    edit(folder, **fields)
    base = toy()
    model = get_peft_model(base, CONFIG) if how == "load_adapter" else None
    before = snapshot(model or base)
    with pytest.raises(error, match=said) as caught:
        model.load_adapter(folder, "other") if model else PeftModel.from_pretrained(base, folder)
    assert str(folder) in str(caught.value)
    assert_untouched(model or base, before)


# ---------------------------------------------------------------------- the card
def front(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])  # type: ignore[no-any-return]


def test_the_card_of_a_model_without_a_config_names_no_base(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["up"], base_model_name_or_path="some/base")
    get_peft_model(toy(), config).save_pretrained(tmp_path / "toy")
    assert front(tmp_path / "toy") == {"library_name": "peft", "tags": ["lora"]}
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path="some/base")
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "llama")
    assert front(tmp_path / "llama")["base_model"] == "some/base"
    assert front(tmp_path / "llama")["tags"] == ["base_model:adapter:some/base", "lora", "transformers"]
    model.create_or_update_model_card(tmp_path / "llama")
    assert front(tmp_path / "llama")["base_model"] == "some/base"


# ---------------------------------------------------------------------- while another process saves
def test_loading_while_another_process_saves(tmp_path: Path) -> None:
    """Config and tensors are of one save, whatever is saved meanwhile."""
    models = {}
    for r in (2, 3):
        models[r] = get_peft_model(toy(), LoraConfig(r=r, target_modules=["up"], init_lora_weights=False)).eval()
    models[2].save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            draw = random.Random(0)
            for _ in range(25):
                models[draw.choice((2, 3))].save_pretrained(tmp_path)
        finally:
            os._exit(0)
    seen = set()
    while not os.waitpid(child, os.WNOHANG)[0]:
        loaded = PeftModel.from_pretrained(toy(), tmp_path)
        r = loaded.peft_config["default"].r
        assert torch.equal(loaded(IDS), models[r](IDS))
        seen.add(r)
    assert seen


def test_a_prefix_is_loaded_from_its_own_folder_again(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path)
    before = logits(model, tokens(2, 5, 60))
    assert model.load_adapter(tmp_path, "default", is_trainable=True) == ([], [])
    assert torch.equal(logits(model, tokens(2, 5, 60)), before)


def test_an_adapter_saved_with_its_embeddings_is_loaded_into_itself(tmp_path: Path) -> None:
    """As trainers do with the best checkpoint."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).eval()
    move(model, "default")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    expected = logits(model, tokens(2, 5, 60))
    move(model, "default")
    assert model.load_adapter(tmp_path, "default", is_trainable=True) == ([], [])
    assert torch.equal(logits(model, tokens(2, 5, 60)), expected)


# ---------------------------------------------------------------------- into a name that is there
@pytest.mark.parametrize(
    "saved",
    [
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"alpha_pattern": {"down": 3}},
        {"lora_alpha": 2, "lora_dropout": 0.5},
        {"lora_alpha": 32, "use_dora": False, "init_lora_weights": "gaussian"},
    ],
)
def test_loading_into_a_name_that_is_there_reads_the_scales_of_the_file(saved: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = get_peft_model(toy(), LoraConfig(r=4, target_modules=["up", "down"], **saved)).eval()
    move(other, "default")
    other.save_pretrained(tmp_path)
    model = get_peft_model(toy(), LoraConfig(r=4, target_modules=["up", "down"])).eval()
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config["default"]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    ids = tokens()
    torch.testing.assert_close(model.eval()(ids), other(ids))
    assert model.peft_config["default"] is config
    assert (config.lora_alpha, config.use_rslora) == (other.peft_config["default"].lora_alpha, "use_rslora" in saved)
    now = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(now[n] is p for n, p in held.items()), "an optimiser that holds them goes on"
    model.add_adapter("beside", LoraConfig(r=4, target_modules=["up", "down"]))
    assert model.base_model.model.up.scaling["beside"] == 2.0, "others of the former config keep theirs"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_loading_over_an_adapter_of_the_base_takes_its_place(folder: Path, tmp_path: Path) -> None:
    """PEFT's Whisper example restores its checkpoints so."""
    model = get_peft_model(toy(), CONFIG).eval()
    base, start = model.base_model.model, model(IDS)
    shutil.copytree(folder, tmp_path / "wrong")
    edit(tmp_path / "wrong", r=3)
    with pytest.raises(AdapterFileError, match="wrong"):
        PeftModel.from_pretrained(base, tmp_path / "wrong")
    assert torch.equal(model(IDS), start)
    assert model.active_adapters == ["default"]
    with pytest.warns(UserWarning, match=r"Already found a `peft_config` .* Adapter 'default' is replaced"):
        read = PeftModel.from_pretrained(base, folder)
    assert read.base_model.model is base
    fresh = PeftModel.from_pretrained(toy(), folder)
    assert torch.equal(model(IDS), fresh(IDS))
    assert torch.equal(read(IDS), fresh(IDS))
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for p in model.parameters())
    PeftModel.from_pretrained(base, folder, adapter_name="other")
    assert sorted(model.peft_config) == ["default", "other"]


def test_loading_another_method_into_a_name_that_is_there(tmp_path: Path) -> None:
    get_peft_model(toy(), LoHaConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    model = get_peft_model(toy(), LoraConfig(r=4, target_modules=["up"])).eval()
    expected = model(tokens())
    with pytest.raises(PeftError):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(tokens()), expected)
    assert model.peft_config["default"].peft_type.value == "LORA"
