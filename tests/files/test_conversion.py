"""Files from before transformers moved modules: their keys, and the names in their configs, are read by today's."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.contract.cases import move
from tests.models import LLAMA, assert_untouched, llama, logits, snapshot
from trimtab import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from trimtab.errors import AdapterFileError, PeftWarning
from trimtab.files.conversion import Names, transforms
from trimtab.files.store import WEIGHTS

IDS = torch.arange(3, 13).view(2, 5)


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**LLAMA), image_token_index=60)
    ).eval()


def qwen2_vl() -> Any:
    torch.manual_seed(0)
    text = {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61)
    return Qwen2VLForConditionalGeneration(config).eval()


# model -> (how to build it, today's path -> its path before transformers 4.52)
MOVED: dict[str, tuple[Callable[[], Any], Callable[[str], str]]] = {
    "llava": (
        llava,
        lambda path: re.sub(
            r"^model\.(vision_tower|multi_modal_projector)",
            r"\1",
            path.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head"),
        ),
    ),
    "qwen2_vl": (
        qwen2_vl,
        lambda path: path.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    ),
}


def former(folder: Path, name: str, **fields: Any) -> PeftModel:
    """Save an adapter and give it the keys and names that it would have had; returns the model."""
    build, before = MOVED[name]
    model = get_peft_model(build(), LoraConfig(r=2, **fields)).eval()
    move(model, "default")
    model.save_pretrained(folder)
    start = "base_model.model."
    values = {start + before(k.removeprefix(start)): v for k, v in load_file(folder / WEIGHTS).items()}
    assert values.keys() != load_file(folder / WEIGHTS).keys()
    save_file(values, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config[field], list):
            config[field] = [before(entry) for entry in config[field]]
    config["rank_pattern"] = {before(k): v for k, v in config["rank_pattern"].items()}
    path.write_text(json.dumps(config))
    return model


PATH = "model.language_model.layers.1.self_attn"
CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "paths": {"target_modules": [f"{PATH}.q_proj", f"{PATH}.o_proj"], "rank_pattern": {f"{PATH}.q_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["model.language_model.norm", "lm_head"]},
    "exclusion": {"target_modules": ["q_proj"], "exclude_modules": [f"{PATH}.q_proj"]},
}


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MOVED)
def test_files_from_before_modules_moved(name: str, config: str, how: str, tmp_path: Path) -> None:
    build, _ = MOVED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = former(tmp_path, name, **CONFIGS[config])
        if how == "from_pretrained":
            loaded: Any = PeftModel.from_pretrained(build(), tmp_path)
        elif how == "load_adapter":
            loaded = get_peft_model(build(), LoraConfig(target_modules=["k_proj"]))
            assert loaded.load_adapter(tmp_path, "other") == ([], [])
            loaded.set_adapter("other", inference_mode=True)
        else:
            loaded = get_peft_model(build(), PeftConfig.from_pretrained(tmp_path)).eval()
            assert set_peft_model_state_dict(loaded, load_file(tmp_path / WEIGHTS)) == ([], [])
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))
        assert not torch.equal(logits(loaded, IDS), logits(build(), IDS))
        adapter = "other" if how == "load_adapter" else "default"
        found = get_peft_model_state_dict(loaded, adapter_name=adapter)
        assert found.keys() == get_peft_model_state_dict(model).keys(), "saved again, it has today's names"


def test_an_expression_that_fits_former_paths_only(tmp_path: Path) -> None:
    model = former(tmp_path, "llava", target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj")
    path = tmp_path / "adapter_config.json"
    text = json.loads(path.read_text())
    path.write_text(
        json.dumps({**text, "target_modules": r"^language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj"})
    )
    with pytest.warns(PeftWarning, match="`target_modules` name modules as earlier releases of transformers did"):
        loaded = PeftModel.from_pretrained(llava(), tmp_path)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_keys_that_fit_under_no_name_are_errors_as_ever(tmp_path: Path) -> None:
    former(tmp_path, "llava", target_modules=["q_proj"])
    values = load_file(tmp_path / WEIGHTS)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in values.items()}, tmp_path / WEIGHTS)
    base = llava()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=r"missing keys .*unexpected keys .*language_model\.model\.layers\.7"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_there_and_back() -> None:
    for build, before in MOVED.values():
        model = build()
        names = Names(model, dict(model.named_modules()))
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                assert names.today(f"{before(path)}.lora_A.weight") == f"{path}.lora_A.weight"
                assert names.today(f"base_model.model.{path}.lora_A.weight") == f"base_model.model.{path}.lora_A.weight"
                assert names.split(f"base_model.model.{before(path)}.weight") == (path, "weight")
                assert before(path) == path or before(path) in names.before(path)


def test_models_that_are_not_transformers_have_no_conversions() -> None:
    assert transforms(nn.Linear(2, 2)) == []
    assert transforms(torch.compile(llava(), backend="eager"))  # type: ignore[arg-type]
    names = Names(llama(), dict(llama().named_modules()))
    assert (
        names.today("base_model.model.model.layers.0.x.lora_A.weight")
        == "base_model.model.model.layers.0.x.lora_A.weight"
    )
