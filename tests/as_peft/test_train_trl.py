"""`trimtab dpo`, `grpo`, `kto`, `reward` and `train --trainer trl`: TRL's trainers, our settings, rows and adapters."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.as_peft import tiny
from trimtab.errors import ConfigError, TrainError
from trimtab.train.trl import VERBS, main

REWARDS = "def short(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n"


@pytest.fixture
def there(tmp_path, monkeypatch, tokenizer):
    """A base with a tokenizer, rows of every kind, a reward, and the folder they are in."""
    monkeypatch.chdir(tmp_path)
    tiny.llama(len(tokenizer)).save_pretrained("base")
    template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    tokenizer.save_pretrained("base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = template
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    good, bad = " sees a bird", " eats a small dog today"
    rows = {
        "sft": [{"prompt": "the red cat", "completion": good}] * 8,
        "pairs": [{"prompt": "the red cat", "chosen": good, "rejected": bad}] * 8,
        "votes": [{"prompt": "the red cat", "completion": c, "label": c == good} for c in (good, bad)] * 4,
        "scores": [{"chosen": "the cat" + good, "rejected": "the cat" + bad}] * 8,
        "prompts": [{"prompt": "the red cat"}, {"prompt": "a blue dog"}] * 4,
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


COMMON = {"model": "base", "max_steps": 2, "per_device_train_batch_size": 4, "precision": "fp32", "r": 4,
          "learning_rate": 1e-2, "output": "run", "device": "cpu", "warmup_ratio": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "data", "more"),
    [
        ("train", "sft", {"eval_data": "sft.jsonl"}),
        ("dpo", "pairs", {"beta": "0.2", "label_smoothing": "0.05"}),
        ("kto", "votes", {}),
        ("reward", "scores", {}),
        ("grpo", "prompts", {"reward_funcs": "rewards.py:short", "num_generations": 4, "max_completion_length": 4}),
    ],
)
def test_each_verb_trains_an_adapter(verb, data, more, there) -> None:
    main(verb, [{**COMMON, "data": f"{data}.jsonl", **more}])
    weights = load_file(there / "run" / "adapter" / "adapter_model.safetensors")
    assert any(float(value.abs().max()) > 0 for name, value in weights.items() if "lora_B" in name)
    config = json.loads((there / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "base")
    assert config["task_type"] == ("SEQ_CLS" if verb == "reward" else "CAUSAL_LM")
    content = json.loads((there / "run" / "adapter" / "trimtab.json").read_text())
    assert content["trainer"] == f"{VERBS[verb]}Trainer"
    assert content["base_model"]["fingerprint"]
    assert f"`trimtab {verb}`" in (there / "run" / "adapter" / "README.md").read_text()
    lines = [json.loads(line) for line in (there / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2]
    if verb == "train":
        assert [m["step"] for m in lines if "eval_loss" in m]
        base = AutoModelForCausalLM.from_pretrained("base")
        assert PeftModel.from_pretrained(base, there / "run" / "adapter").active_adapters == ["default"]


def test_a_run_is_resumed_and_an_adapter_continued(there) -> None:
    settings = {**COMMON, "data": "sft.jsonl", "save_steps": 1}
    main("train", [settings])
    with pytest.raises(TrainError, match="holds another run"):
        main("train", [settings])
    main("train", [{**settings, "max_steps": 4, "resume": True}])
    lines = [json.loads(line) for line in (there / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3, 4]
    own = {k: v for k, v in settings.items() if k != "r"}
    main("dpo", [{**own, "data": "pairs.jsonl", "output": "dpo", "continue_from": "run/adapter"}])
    assert load_file(there / "dpo" / "adapter" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    ("verb", "more", "message"),
    [
        ("dpo", {"betta": 1}, r"trimtab dpo: betta is no setting.*did you mean beta\?"),
        ("train", {"optimizer": "lorafa"}, "do not take optimizer lorafa"),
        ("dpo", {"train_on": "all", "plain": True}, "do not take train_on, plain"),
        ("grpo", {}, "needs functions that reward"),
        ("grpo", {"reward_funcs": "rewards.py:long"}, "rewards.py has no long"),
        ("grpo", {"reward_funcs": "no.py:long"}, "there is no file no.py"),
    ],
)
def test_what_cannot_be(verb, more, message, there) -> None:
    with pytest.raises(ConfigError, match=message):
        main(verb, [{**COMMON, "data": "prompts.jsonl" if verb == "grpo" else "sft.jsonl", **more}])
    assert not (there / "run").exists()
