"""Which adapters train a classifier's head: by the task of their config, or of the class they are added to."""

from __future__ import annotations

from tests.models import classifier
from trimtab import LoraConfig, get_peft_model
from trimtab.layer.copies import SavedModule
from trimtab.shell.tasks import PeftModelForSequenceClassification

TASK, NONE = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])


def heads(model: object) -> set[str]:
    """The adapters that have a head of their own."""
    found: set[str] = set()
    for module in model.modules():  # type: ignore[attr-defined]
        if isinstance(module, SavedModule):
            found |= {*module.modules_to_save}
    return found


def test_a_second_adapter_without_a_task_has_a_head_as_well() -> None:
    model = get_peft_model(classifier(), TASK)
    model.add_adapter("other", NONE)
    assert heads(model) == {"default", "other"}


def test_the_class_says_the_task() -> None:
    assert heads(PeftModelForSequenceClassification(classifier(), NONE)) == {"default"}
    assert heads(get_peft_model(classifier(), NONE)) == set()
