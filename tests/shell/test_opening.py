"""Opening models as commands name them."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.folders import adapter_folder, base_folder
from trimtab import LoraConfig, PeftModel
from trimtab.errors import AdapterFileError, AdapterNameError, BaseModelError, ConfigError
from trimtab.shell.opening import named, open_model, using

IDS = torch.tensor([[1, 5, 9, 30]])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("opening")
    base_folder(root / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        adapter_folder(root / name, root / "base", seed)
    return root


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_base_alone(root) -> None:
    opened = open_model(str(root / "base"))
    assert not isinstance(opened.model, PeftModel)
    assert (opened.base, opened.adapters) == (str(root / "base"), {})
    assert opened.need_tokenizer().chat_template
    assert opened.where == "float32, cpu"


def test_an_adapter_brings_its_base(root) -> None:
    opened = open_model(root / "one")
    assert (opened.base, opened.adapters) == (str(root / "base"), {"one": str(root / "one")})
    direct = open_model(root / "base", [str(root / "one")])
    assert torch.equal(logits(opened.model), logits(direct.model))
    assert not opened.model.training


def test_several_adapters_by_name(root) -> None:
    opened = open_model(root / "base", [f"x={root / 'one'}", str(root / "two")])
    assert list(opened.adapters) == ["x", "two"]
    assert opened.model.active_adapters == ["x"]
    with using(opened.model, "two"):
        second = logits(opened.model)
    assert torch.equal(second, logits(open_model(root / "two").model))
    assert opened.model.active_adapters == ["x"]
    with using(opened.model, "base"):
        assert torch.equal(logits(opened.model), logits(open_model(root / "base").model))
    with using(opened.model, None):
        assert torch.equal(logits(opened.model), logits(open_model(root / "base").model))


def test_using_leaves_what_trains(root) -> None:
    model = open_model(root / "base", {"one": str(root / "one"), "two": str(root / "two")}).model
    model.set_adapter("one")
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    assert before
    with using(model, "two"):
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_names() -> None:
    assert named(["runs/a/adapter", "x=runs/b", "v1.5"]) == {"a": "runs/a/adapter", "x": "runs/b", "v1_5": "v1.5"}
    assert named(["runs/base/adapter", "null"]) == {"base_adapter": "runs/base/adapter", "null_adapter": "null"}
    with pytest.raises(AdapterNameError, match="two of that name"):
        named(["a/adapter", "b/a"])
    for reserved in ("base", "null"):
        with pytest.raises(AdapterNameError, match="reserved"):
            named([f"{reserved}=x"])


def test_a_whole_model_as_an_adapter_and_a_run_as_a_model(root, tmp_path) -> None:
    with pytest.raises(AdapterFileError, match="whole model"):
        open_model(root / "base", [str(root / "base")])
    shutil.copytree(root / "one", tmp_path / "run" / "checkpoint-7")
    with pytest.raises(BaseModelError, match="checkpoint-7"):
        open_model(tmp_path / "run")


def test_an_adapter_that_does_not_name_its_base(root, tmp_path) -> None:
    shutil.copytree(root / "one", tmp_path / "one")
    config = (tmp_path / "one" / "adapter_config.json").read_text()
    (tmp_path / "one" / "adapter_config.json").write_text(config.replace(f'"{root / "base"}"', "null"))
    with pytest.raises(BaseModelError, match="--model"):
        open_model(tmp_path / "one")
    assert open_model(root / "base", [str(tmp_path / "one")]).adapters
    (tmp_path / "one" / "adapter_config.json").write_text(config.replace(str(root / "base"), "/gone/away"))
    with pytest.raises(BaseModelError, match="names /gone/away as its base, which is not there"):
        open_model(tmp_path / "one")


def test_nothing_and_a_folder_without_weights(root, tmp_path) -> None:
    with pytest.raises(BaseModelError, match="There is no folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(BaseModelError, match="Name a model"):
        open_model()
    shutil.copytree(root / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        open_model(tmp_path / "base")


def test_an_adapter_of_another_base(root, tmp_path) -> None:
    base_folder(tmp_path / "other", hidden_size=32)
    with pytest.raises(AdapterFileError, match="does not fit"):
        open_model(tmp_path / "other", [str(root / "one")])


def test_a_tokenizer_beside_the_adapter_wins_and_none_is_said(root, tmp_path) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    opened = open_model(tmp_path / "base")
    assert opened.tokenizer is None
    with pytest.raises(BaseModelError, match="no tokenizer"):
        opened.need_tokenizer()
    shutil.copytree(root / "one", tmp_path / "one")
    for file in (root / "base").glob("*token*"):
        shutil.copy(file, tmp_path / "one")
    assert open_model(tmp_path / "base", [str(tmp_path / "one")]).tokenizer is not None


def test_a_classifier_is_opened_as_one(root, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    from trimtab import get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path / "c")
    assert type(open_model(tmp_path / "c").model).__name__ == "PeftModelForSequenceClassification"
    with pytest.raises(ConfigError, match="is for SEQ_CLS, and this needs one for CAUSAL_LM"):
        open_model(tmp_path / "c", task="CAUSAL_LM")


def test_the_number_format_is_as_asked(root) -> None:
    assert open_model(root / "base", dtype="bfloat16").where == "bfloat16, cpu"
