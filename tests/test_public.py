"""What a user sees: the names, the cost of an import, the numbers that are printed."""

from __future__ import annotations

import inspect
import pickle
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import trimtab
from tests.models import toy
from trimtab import LoraConfig, get_peft_model

# What issue 2 promises; more may come, none of these may go.
PROMISED = """
AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
LoraConfig LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING NoMatchingPeftModuleError PeftConfig PeftError PeftModel
PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PeftWarning PromptLearningConfig TaskType
TrainableTokensConfig TunerLayerStatus TunerModelStatus __version__ get_layer_status get_model_status get_peft_model
get_peft_model_state_dict inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training
set_peft_model_state_dict
""".split()


def test_all() -> None:
    assert set(PROMISED) <= set(trimtab.__all__)
    assert len(set(trimtab.__all__)) == len(trimtab.__all__)
    assert trimtab.__all__[1:] == sorted(trimtab.__all__[1:])
    assert set(trimtab.__all__) <= set(dir(trimtab))


@pytest.mark.parametrize("name", trimtab.__all__)
def test_every_public_name_resolves_and_is_explained(name: str) -> None:
    value = getattr(trimtab, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert (value.__doc__ or "").strip()
        assert not (value.__doc__ or "").startswith(f"{name}("), "dataclass's own signature is no docstring"
        assert value.__name__ == name
        for attribute, member in vars(value).items():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


def test_unknown_names_are_attribute_errors() -> None:
    for name in ("Nonsense", "NonsenseModel", "_private"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(trimtab, name)


# ---------------------------------------------------------------------- the import
def seconds(code: str) -> float:
    """The least processor time of several runs of Python: the clock's would count what other processes take."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    found = []
    for _ in range(5):
        start = spent()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        found.append(spent() - start)
    return min(found)


def test_import_takes_next_to_nothing_and_no_torch() -> None:
    heavy = "torch transformers safetensors huggingface_hub numpy peft accelerate".split()
    code = f"import trimtab, sys; sys.exit(any(m in sys.modules for m in {heavy!r}))"
    assert seconds(code) - seconds("import sys; sys.exit(0)") < 0.3


def test_the_version_and_the_list_of_names_need_no_torch_either() -> None:
    code = "import trimtab, sys; trimtab.__version__, dir(trimtab), trimtab.__all__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------- tuners
def test_tuner_classes_go_through_pickle() -> None:
    model = get_peft_model(toy(), LoraConfig(target_modules=["up"]))
    cls = type(model.base_model)
    assert cls.__name__ == "LoraModel"
    assert pickle.loads(pickle.dumps(cls)) is cls is trimtab.LoraModel
    assert type(pickle.loads(pickle.dumps(model)).base_model) is cls
    alone = trimtab.LoraModel(toy(), LoraConfig(target_modules=["up"]), "mine")
    assert alone.active_adapters == ["mine"]
    assert isinstance(alone.model.up, type(model.base_model.model.up))


# ---------------------------------------------------------------------- the seed's numbers
def test_gpt2_prints_the_numbers_everybody_knows(capsys: Any) -> None:
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config())
    base.tie_weights()
    model = get_peft_model(base, LoraConfig())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364\n"
    assert model.get_nb_trainable_parameters() == (294_912, 124_734_720)
