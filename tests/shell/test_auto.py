"""AutoPeftModel: a base model and an adapter out of a folder, and nothing that a file names is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.contract.cases import move
from tests.models import classifier, llama, logits, tokens
from trimtab import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from trimtab.errors import AdapterFileError, ArgumentError, BaseModelError, ConfigError

IDS = tokens(2, 5, 60)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, folder: Path, cls: Any = LlamaForCausalLM, rows: int | None = None, **fields: Any) -> PeftModel:
    """An adapter of the model in `base`, trained a little, in `folder`."""
    start = cls.from_pretrained(base)
    if rows is not None:
        start.resize_token_embeddings(rows)
    model = get_peft_model(start, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})).eval()
    move(model, "default")
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_by_task_and_by_class(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        assert torch.equal(logits(cls.from_pretrained(tmp_path / "a"), IDS), logits(model, IDS))
    with pytest.raises(ConfigError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a")
    model = saved(base, tmp_path / "b")  # no task: the class is in the file
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama",
    }  # fmt: skip
    assert torch.equal(logits(AutoPeftModel.from_pretrained(tmp_path / "b"), IDS), logits(model, IDS))


# ---------------------------------------------------------------------- what a file names is not run
@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that leaves a mark when it is imported."""
    mark = tmp_path / "it-ran"
    (tmp_path / "planted").mkdir()
    for name in ("evil", "transformers_evil"):
        (tmp_path / "planted" / f"{name}.py").write_text(
            f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nfrom transformers import LlamaForCausalLM as Model\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path / "planted"))
    return mark


@pytest.mark.parametrize("library", ["evil", "transformers_evil", "transformers_evil.sub", "os", ".evil", "", " evil"])
def test_a_module_that_a_file_names_is_not_imported(library: str, planted: Path, base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    edit(tmp_path / "a", auto_mapping={"parent_library": library, "base_model_class": "Model"})
    with pytest.raises(
        ConfigError, match=r"names 'Model' of '.*import_allowlist=\['.*PeftModel\.from_pretrained\(model"
    ):
        AutoPeftModel.from_pretrained(tmp_path / "a")
    assert not planted.exists()


def test_a_module_that_the_caller_names_is(planted: Path, base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "a")
    edit(tmp_path / "a", auto_mapping={"parent_library": "evil", "base_model_class": "Model"})
    loaded = AutoPeftModel.from_pretrained(tmp_path / "a", import_allowlist=["evil"])
    assert planted.exists()
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    sys.modules.pop("evil")


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"parent_library": "transformers.no_such_module", "base_model_class": "A"}, "No module named"),
        ({"parent_library": "transformers", "base_model_class": "NoSuchClass"}, "NoSuchClass"),
        ({"parent_library": "transformers", "base_model_class": "logging"}, "which is none"),
        ({"parent_library": "transformers", "base_model_class": "set_seed"}, "which is none"),
        ({"parent_library": 3, "base_model_class": "A"}, "names no class"),
        ({"parent_library": "transformers"}, "names no class"),
        ({"x": 1}, "names no class"),
    ],
)
def test_a_class_that_is_none(mapping: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    edit(tmp_path / "a", auto_mapping=mapping)
    with pytest.raises(ConfigError, match=said) as caught:
        AutoPeftModel.from_pretrained(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


# ---------------------------------------------------------------------- the base model
def test_a_base_that_moved_is_named_with_its_adapter(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(BaseModelError, match=r"there is no such folder.*PeftModel\.from_pretrained") as caught:
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert f"adapter in '{tmp_path / 'a'}' is '{base}'" in str(caught.value)
    for name in ("models/base", "nobody/no-such-model", "not a valid id!"):
        edit(tmp_path / "a", base_model_name_or_path=name)
        with pytest.raises(BaseModelError, match=f"adapter in '{tmp_path / 'a'}' is '{name}', which cannot be loaded"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="does not name its base model"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")


def test_arguments_that_are_no_folder(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    for given in (llama(), None, LoraConfig()):
        with pytest.raises(ArgumentError, match=r"AutoPeftModelForCausalLM\.from_pretrained\(folder\)"):
            AutoPeftModelForCausalLM.from_pretrained(given)  # type: ignore[arg-type]
    with pytest.raises(AdapterFileError, match="holds a whole model, not an adapter"):
        AutoPeftModelForCausalLM.from_pretrained(base)


# ---------------------------------------------------------------------- the vocabulary
def tokenizer(size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(size)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0"))).save_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == size


ROWS: dict[str, dict[str, Any]] = {
    "saved along": {},
    "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "copied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head copied": {"modules_to_save": ["lm_head"]},
    "some rows trained": {"trainable_token_indices": [65, 66]},
}


@pytest.mark.parametrize("rows", [70, 40])
@pytest.mark.parametrize("how", ROWS)
def test_the_adapters_own_rows_come_before_the_tokenizers(how: str, rows: int, base: Path, tmp_path: Path) -> None:
    fields = {k: [t % rows for t in v] if k == "trainable_token_indices" else v for k, v in ROWS[how].items()}
    model = saved(base, tmp_path / "a", rows=rows, task_type="CAUSAL_LM", **fields)
    tokenizer(66, tmp_path / "a")  # a vocabulary that was padded when it was resized
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert len(loaded.get_base_model().get_input_embeddings().weight) == rows
    ids = torch.tensor([[rows - 1, 3, 5]])
    if how != "the head copied":
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_tokenizer_is_fitted_where_the_file_has_no_rows(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    for size, rows in ((66, 66), (50, 64)):
        tokenizer(size, tmp_path / "a")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
        assert len(loaded.get_base_model().get_input_embeddings().weight) == rows
        assert logits(loaded, IDS).shape[-1] == rows


def test_rows_of_a_pickled_adapter(base: Path, tmp_path: Path) -> None:
    start = LlamaForCausalLM.from_pretrained(base)
    start.resize_token_embeddings(70)
    model = get_peft_model(start, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a", safe_serialization=False)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert len(loaded.get_base_model().get_input_embeddings().weight) == 70


def test_a_damaged_file_is_named_before_the_base_is_resized(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors' cannot be read"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_classifier(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "base")
    start = type(classifier()).from_pretrained(tmp_path / "base")
    model = get_peft_model(start, LoraConfig(task_type="SEQ_CLS", r=2)).eval()
    move(model, "default")
    model.save_pretrained(tmp_path / "a")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=3)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_arguments_for_the_adapter_are_not_the_bases(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", task_type="CAUSAL_LM")
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "a", import_allowlist=None, dtype=torch.bfloat16, autocast_adapter_dtype=False, torch_device="cpu"
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
