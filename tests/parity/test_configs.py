"""Every config class against the installed peft's: fields, defaults, files, what is refused and said."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import trimtab
from tests.parity.models import build
from tests.parity.pairs import quiet, spoken

CLASSES = sorted(c.__name__ for c in PEFT_TYPE_TO_CONFIG_MAPPING.values())
NEEDED: dict[str, dict[str, Any]] = {
    "CPTConfig": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 2]},
    "AdaLoraConfig": {"total_step": 1000},
    "XLoraConfig": {"hidden_size": 8, "adapters": {"0": "x"}},
    "TrainableTokensConfig": {"token_indices": [1]},
}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("AdaLoraConfig", {"total_step": None}),
    ("AdaLoraConfig", {"tinit": 900, "tfinal": 200}),
    ("AdaLoraConfig", {"use_dora": True}),
    ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 0}),
    ("BOFTConfig", {"boft_block_size": 4, "boft_block_num": 4}),
    ("CartridgeConfig", {"num_virtual_tokens": 1, "num_frozen_tokens": 2}),
    ("CPTConfig", {"task_type": "SEQ_CLS"}),
    ("DeloraConfig", {"r": 0}),
    ("GraloraConfig", {"r": -1}),
    ("IA3Config", {"target_modules": ["k"], "feedforward_modules": ["q"]}),
    ("LoraConfig", {"layers_pattern": "h"}),
    ("LoraConfig", {"target_modules": "a.*", "layers_to_transform": [0]}),
    ("LoraConfig", {"target_modules": "a.*", "layers_pattern": "h"}),
    ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}),
    ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}),
    ("UniLoraConfig", {"bias": "lora_only"}),
]
SAID: list[tuple[str, dict[str, Any]]] = [
    ("XLoraConfig", {"adapters": None}),
    ("XLoraConfig", {"enable_softmax": True, "enable_softmax_topk": True, "top_k_lora": 2}),
]


def made(library: Any, name: str, **fields: Any) -> Any:
    return quiet(getattr(library, name), **{**NEEDED.get(name, {}), **fields})


def plain(value: Any) -> Any:
    """A value as a file would have it, sets sorted."""
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


@pytest.mark.parametrize("name", CLASSES)
def test_fields_defaults_and_files(name: str, tmp_path: Path) -> None:
    configs = [made(library, name) for library in (peft, trimtab)]
    theirs, ours = (plain(config.to_dict()) for config in configs)
    assert ours == theirs
    fields = [{f.name for f in dataclasses.fields(config)} for config in configs]
    assert fields[0] == fields[1]
    for config, folder in zip(configs, ("theirs", "ours"), strict=True):
        config.save_pretrained(str(tmp_path / folder))
    files = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours")]
    assert files[0] == files[1]
    assert configs[0].is_prompt_learning == configs[1].is_prompt_learning
    assert configs[0].is_adaption_prompt == configs[1].is_adaption_prompt


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("AdaptionPromptConfig", "IA3Config")])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_lists_of_names_are_sets_where_they_are_in_peft(name: str, field: str) -> None:
    if field not in {f.name for f in dataclasses.fields(getattr(peft, name))}:
        return
    theirs, ours = (getattr(made(library, name, **{field: ["a", "b"]}), field) for library in (peft, trimtab))
    assert type(ours) is type(theirs)
    assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_read_whoever_wrote_it(name: str, tmp_path: Path) -> None:
    for writer in (peft, trimtab):
        made(writer, name).save_pretrained(str(tmp_path))
        for cls in (trimtab.PeftConfig, getattr(trimtab, name)):
            read = quiet(cls.from_pretrained, str(tmp_path))
            assert type(read) is getattr(trimtab, name)
            assert plain(read.to_dict()) == plain(made(trimtab, name, inference_mode=read.inference_mode).to_dict())
        again = getattr(trimtab, name).from_dict(read.to_dict())
        assert plain(again.to_dict()) == plain(read.to_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_unknown_keys_are_told(name: str, tmp_path: Path) -> None:
    made(peft, name).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    said = [
        [text for text in spoken(getattr(library, name).from_pretrained, str(tmp_path)) if "of_tomorrow" in text]
        for library in (peft, trimtab)
    ]
    assert len(said[0]) == len(said[1]) == 1
    assert said[1][0].startswith(f"Unexpected keyword arguments ['of_tomorrow'] for class {name}, these are ignored")
    assert said[0][0][:60] == said[1][0][:60]


@pytest.mark.parametrize("name", CLASSES)
def test_the_fields_that_all_have_come_first(name: str) -> None:
    """By position there are these seven; each class's own follow in an order of its own."""
    first = [list(inspect.signature(getattr(lib, name)).parameters)[:7] for lib in (peft, trimtab)]
    assert first[0] == first[1]


def test_a_class_s_own_fields_follow_in_another_order() -> None:
    orders = [list(inspect.signature(lib.LoraConfig).parameters) for lib in (peft, trimtab)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize(("name", "fields"), REFUSED, ids=str)
def test_refused_with_the_same_first_words(name: str, fields: dict[str, Any]) -> None:
    said = []
    for library in (peft, trimtab):
        with pytest.raises(ValueError, match=r".") as caught:
            made(library, name, **fields)
        said.append(str(caught.value))
    assert said[0].split()[:3] == said[1].split()[:3], said


@pytest.mark.parametrize(("name", "fields"), SAID, ids=str)
def test_said_with_the_same_first_words(name: str, fields: dict[str, Any]) -> None:
    theirs, ours = (
        spoken(lambda lib=lib: getattr(lib, name)(**{**NEEDED.get(name, {}), **fields})) for lib in (peft, trimtab)
    )
    assert len(theirs) == len(ours) == 1, (theirs, ours)
    assert theirs[0].split()[:4] == ours[0].split()[:4]


def test_the_settings_of_a_run_are_the_loading_call_s(tmp_path: Path) -> None:
    """`ephemeral_gpu_offload`, as the guide to DoRA passes it; a method without such settings says that it has none."""
    found = []
    for library in (trimtab, peft):
        base, asked = lambda: build("llama"), {"ephemeral_gpu_offload": True}
        lora, ia3 = tmp_path / library.__name__, tmp_path / f"{library.__name__}-ia3"
        library.get_peft_model(base(), library.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(lora))
        scales = library.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        library.get_peft_model(base(), scales).save_pretrained(str(ia3))
        model = library.PeftModel.from_pretrained(base(), str(lora), **asked)
        model.load_adapter(str(lora), "b", **asked)  # PEFT writes it down in `from_pretrained` alone
        given = library.LoraConfig(target_modules=["q_proj"], runtime_config=library.LoraRuntimeConfig(**asked))
        library.PeftModel.from_pretrained(base(), str(lora), config=given)
        configs = [model.peft_config[name] for name in ("default", "b")]
        found.append([c.runtime_config.ephemeral_gpu_offload for c in (*configs, given)])
        with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported for this model"):
            library.PeftModel.from_pretrained(base(), str(ia3), **asked)
    assert found[0] == found[1] == [True, False, False]
