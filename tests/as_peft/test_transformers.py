"""transformers' own adapter methods, adapter folders in from_pretrained, and pipelines."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, pipeline

from tests.as_peft import tiny

IDS = tiny.batch()


def out(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes})


@pytest.fixture
def folder(tmp_path):
    """A base model's folder, an adapter's, and the adapted output."""
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM"))
    tiny.moved(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, out(model)


def test_adapters_are_added_switched_disabled_and_deleted(llama):
    plain = out(llama)
    llama.add_adapter(config(), "one")
    assert llama.active_adapters() == ["one"]
    assert [n for n, p in llama.named_parameters() if p.requires_grad]
    tiny.moved(llama, "one")
    first = out(llama)
    assert not torch.allclose(first, plain)
    llama.add_adapter(config(r=2), "two")
    assert llama.active_adapters() == ["two"]
    torch.testing.assert_close(out(llama), plain)
    llama.set_adapter(["one", "two"])
    torch.testing.assert_close(out(llama), first)
    llama.set_adapter("one")
    torch.testing.assert_close(out(llama), first)
    llama.disable_adapters()
    assert torch.equal(out(llama), plain)
    llama.enable_adapters()
    torch.testing.assert_close(out(llama), first)
    llama.delete_adapter("one")
    assert list(llama.peft_config) == ["two"]
    torch.testing.assert_close(out(llama), plain)
    llama.add_adapter(config(), "one")
    llama.delete_adapter(["one", "two"])
    assert not hasattr(llama, "peft_config")
    assert torch.equal(out(llama), plain)
    with pytest.raises(ValueError, match="No adapter loaded"):
        llama.set_adapter("one")
    llama.add_adapter(config(), "one")  # and it can begin anew
    assert llama.active_adapters() == ["one"]


def test_deleting_one_of_several_that_are_active(llama):
    for name, target in (("one", "q_proj"), ("two", "q_proj"), ("three", "up_proj")):
        llama.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False), name)
    llama.set_adapter("two")
    wanted = out(llama)
    llama.set_adapter(["two", "one"])
    llama.delete_adapter("one")
    assert llama.active_adapters() == ["two"]
    assert {n for m in llama.modules() if isinstance(m, BaseTunerLayer) for n in m.active_adapters} == {"two"}
    torch.testing.assert_close(out(llama), wanted)
    llama.delete_adapter("two")
    assert llama.active_adapters() == ["three"]
    assert [n for n, p in llama.named_parameters() if p.requires_grad]


def test_training_an_added_adapter(llama):
    llama.add_adapter(config())
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = llama.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [4, 5]}}],
)
def test_saving_and_loading_through_transformers(tmp_path, changes):
    model = tiny.llama()
    model.add_adapter(config(**changes))
    tiny.moved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    again = tiny.llama()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(out(again), out(model))
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(out(theirs), out(model))


def test_load_adapter_leaves_the_base_alone_and_reports_nothing_missing(folder):
    root, adapted = folder
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    info = base.load_adapter(str(root / "adapter"), adapter_name="mine", is_trainable=True)
    assert not info.missing_keys
    assert not info.unexpected_keys
    torch.testing.assert_close(out(base), adapted)
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
        else:
            assert parameter.requires_grad
    state = base.get_adapter_state_dict("mine")
    assert all("lora_" in k and "mine" not in k for k in state)
    base.load_adapter(
        adapter_name="second",
        peft_config=config(task_type="CAUSAL_LM"),
        adapter_state_dict={f"base_model.model.{k}": v for k, v in state.items()},
    )
    base.set_adapter("second")
    torch.testing.assert_close(out(base), adapted)


def test_from_pretrained_of_an_adapters_folder_and_pipelines(folder, tokenizer):
    root, adapted = folder
    tokenizer.save_pretrained(root / "adapter")
    model = AutoModelForCausalLM.from_pretrained(root / "adapter")
    torch.testing.assert_close(out(model), adapted)
    # A PeftModel as it is, a model with an adapter loaded, and a folder.
    answers = []
    for one in (PeftModel.from_pretrained(tiny.llama(), root / "adapter"), model, str(root / "adapter")):
        generate = pipeline("text-generation", model=one, tokenizer=tokenizer, device="cpu")
        answers.append(generate("the red cat", max_new_tokens=4, do_sample=False)[0]["generated_text"])
    assert len(set(answers)) == 1


def test_a_classifiers_pipeline(tokenizer):
    model = get_peft_model(tiny.bert(len(tokenizer)), LoraConfig(task_type="SEQ_CLS"))
    rows = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(["the red cat", "a dog"])
    assert {row["label"] for row in rows} <= {"LABEL_0", "LABEL_1"}


@pytest.mark.parametrize("projections", ["all", "down", "gate and up"])
@pytest.mark.parametrize("name", ["mixtral", "phimoe", "olmoe", "qwen3_moe"])
def test_load_adapter_reads_former_files_of_experts(name, projections, tmp_path):
    """A pair for each Linear of each expert, from before transformers 5 stacked them."""
    from tests.files.test_experts import FAMILIES, build, former_file

    gate, up, down = FAMILIES[name][1]
    names = {"all": [gate, up, down], "down": [down], "gate and up": [gate, up]}[projections]
    left = tuple({gate, up, down} - {*names})
    merged = former_file(tmp_path, name, {"target_modules": [*names, "q_proj"], "lora_alpha": 6}, but=left)
    model = build(name)
    report = model.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    torch.testing.assert_close(out(model), out(merged), rtol=1e-4, atol=1e-4)
