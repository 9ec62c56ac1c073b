"""Files of TRL, axolotl and LLaMA-Factory, as people have them: read line by line, refused by name."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from tests.train.conftest import make_model, make_tokenizer
from trimtab.cli import app
from trimtab.errors import ConfigError
from trimtab.train.adapters import adapter_config
from trimtab.train.config import FIELDS, read_config
from trimtab.train.tools import TOOLS, recognise
from trimtab.train.translate import Translation, translate

TRL = """
model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
dataset_name: data/rows.jsonl
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
packing: true
packing_strategy: bfd
max_length: 2048
logging_steps: 25
warmup_steps: 0.05
eval_strategy: "no"
bf16: true
report_to: [wandb]
output_dir: out/trl
push_to_hub: false
"""

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - down_proj
lora_mlp_kernel: true
wandb_project:
wandb_name:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
loss_watchdog_threshold:
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
special_tokens:
  pad_token: "<|end_of_text|>"
"""

FACTORY = """
### model
model_name_or_path: Qwen/Qwen3-4B
trust_remote_code: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: mine
template: qwen3
cutoff_len: 4096
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen3/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def read(text: str, **given) -> Translation:
    content = yaml.safe_load(text)
    tool = recognise(content)
    assert tool is not None
    return translate(tool, content, given)


def settings(text: str) -> dict:
    """As a config would save them, which also proves that each of them is a setting of ours."""
    config, notices = read_config(read(text).settings)
    assert notices == [], "translations use our own names"
    return config.to_dict()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """LLaMA-Factory's folder of data, with its list."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    entries = {"mine": {"file_name": "mine.json"}, "shared": {"hf_hub_url": "org/set"},
               "turns": {"file_name": "t.json", "formatting": "sharegpt", "columns": {"messages": "talk"}},
               "odd": {"file_name": "o.json", "columns": {"prompt": "frage"}}}  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))


def test_trl() -> None:
    found = settings(TRL)
    expected = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "data/rows.jsonl", "method": "lora", "r": 32,
        "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-4, "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "gradient_checkpointing": True,
        "packing": True, "max_length": 2048, "too_long": "truncate", "warmup_ratio": 0.05, "eval_steps": -1,
        "precision": "bf16", "report_to": ["wandb"], "output": "out/trl", "lora_dropout": 0.05,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected


def test_axolotl() -> None:
    found = settings(AXOLOTL)
    expected = {
        "model": "NousResearch/Llama-3.2-1B", "data": "teknium/GPT4-LLM-Cleaned", "messages_field": "conversations",
        "val_size": 0.1, "output": "./outputs/lora-out", "method": "lora", "max_length": 2048, "too_long": "drop",
        "packing": True, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["gate_proj", "down_proj"],
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 2.0,
        "optimizer": "adamw", "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "precision": "auto",
        "warmup_ratio": 0.1, "eval_steps": 0.125, "save_steps": 0, "weight_decay": 0.01,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected


def test_llama_factory(registry) -> None:
    found = settings(FACTORY)
    expected = {
        "model": "Qwen/Qwen3-4B", "data": "data/mine.json", "r": 8, "lora_alpha": 16, "target_modules": "all-linear",
        "max_length": 4096, "too_long": "truncate", "output": "saves/qwen3/lora/sft", "save_steps": 500,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "precision": "bf16", "val_size": 0.1, "eval_steps": 500,
        "per_device_eval_batch_size": 1,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected
    for name, wanted in (("shared", {"data": "org/set"}), ("turns", {"data": "data/t.json", "messages_field": "talk"})):
        assert wanted.items() <= read(FACTORY.replace("dataset: mine", f"dataset: {name}")).settings.items()


def test_every_line_of_a_file_is_accounted_for(registry) -> None:
    for text in (TRL, AXOLOTL, FACTORY):
        said = " ".join(line.theirs for line in read(text).lines)
        assert all(f"{key}: " in said for key in yaml.safe_load(text)), text[:20]


def test_what_a_tool_takes_by_default_is_said(registry) -> None:
    short = {
        "TRL": "use_peft: true\ndataset_name: a.jsonl\nmodel_name_or_path: m",
        "axolotl": "base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlearning_rate: 1e-4\n"
        "datasets: [{path: a.jsonl, type: alpaca}]",
        "LLaMA-Factory": "stage: sft\nmodel_name_or_path: m\ndataset: mine",
    }
    made = {tool: adapter_config(read_config(read(text).settings)[0], 1) for tool, text in short.items()}
    assert {tool: (c.r, c.lora_alpha, c.lora_dropout) for tool, c in made.items()} == {
        "TRL": (16, 32, 0.05), "axolotl": (8, 16, 0.0), "LLaMA-Factory": (8, 16, 0.0),
    }  # fmt: skip
    assert [made[tool].target_modules for tool in short] == [None, None, "all-linear"], "PEFT's own by architecture"
    rates = {tool: read_config(read(text).settings)[0].learning_rate for tool, text in short.items()}
    assert rates == {"TRL": 2e-5, "axolotl": 1e-4, "LLaMA-Factory": 5e-5}
    lines = read(short["TRL"]).lines
    assert any(x.ours == "learning_rate: 2e-05" and x.note == "TRL's default" for x in lines)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            TRL + "load_in_4bit: true\nneftune_noise_alpha: 5\nfancy: 1",
            ["load_in_4bit", "neftune_noise_alpha", "fancy"],
        ),
        (TRL.replace("use_peft: true", "use_peft: false"), ["the whole model"]),
        (TRL.replace('eval_strategy: "no"', "eval_strategy: steps"), ["give --eval-data"]),
        (TRL.replace("packing_strategy: bfd", "packing_strategy: wrapped"), ["packing_strategy: wrapped"]),
        (TRL + "optim: adamw_8bit", ["adamw_8bit is not built in", "give --optimizer"]),
        (AXOLOTL.replace("adapter: lora", "adapter: qlora"), ["stored in 4 bits"]),
        (AXOLOTL.replace("type: chat_template", "type: input_output"), ["rows of the type input_output"]),
        (AXOLOTL + "rl: dpo\ndeepspeed: zero2.json", ["rl: dpo: trimtab dpo does that", "accelerate launch"]),
        (AXOLOTL.replace("roles_to_train: [assistant]", "roles_to_train: [user]"), ["roles_to_train"]),
        (FACTORY.replace("stage: sft", "stage: dpo"), ["trimtab dpo does that"]),
        (FACTORY.replace("dataset: mine", "dataset: nowhere"), ["nowhere is not in data/dataset_info.json"]),
        (FACTORY.replace("dataset: mine", "dataset: odd"), ["columns.prompt of the entry odd"]),
        (FACTORY.replace("dataset: mine", "dataset: mine,shared"), ["join the data sets"]),
        (FACTORY.replace("finetuning_type: lora", "finetuning_type: full"), ["finetuning_type: full"]),
    ],
)
def test_what_cannot_be_honoured_is_named_all_of_it(text, faults, registry) -> None:
    with pytest.raises(ConfigError, match="not all of it can be honoured") as caught:
        read(text)
    for fault in faults:
        assert fault in str(caught.value), fault


def test_a_flag_decides_what_a_file_leaves_open() -> None:
    text = TRL.replace('eval_strategy: "no"', "eval_strategy: steps") + "optim: adamw_8bit"
    assert read(text, eval_data="v.jsonl", optimizer="adamw").settings["data"] == "data/rows.jsonl"


def test_files_of_ours_are_no_other_tools() -> None:
    assert recognise({"model": "m", "data": "d", "r": 8, "lora_alpha": 16}) is None
    assert recognise({"base_model": "m", "micro_batch_size": 1}).name == "axolotl"
    names = [rule for tool in TOOLS for rule in tool.rules.values() if isinstance(rule, str)]
    assert {n for n in names if n not in FIELDS} <= {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save",
        "rank_pattern", "target_parameters", "alpha_pattern", "fan_in_fan_out", "init_lora_weights",
        "trainable_token_indices",
        "layers_to_transform", "layers_pattern",
    }  # fmt: skip


def test_the_command_prints_the_translation_and_trains(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    rows = [{"instruction": f"{i}+{i}=", "input": "", "output": str(2 * i)} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "ax.yml").write_text(
        "base_model: base\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\nlearning_rate: 0.001\n"
        "datasets: [{path: rows.json, type: alpaca}]\nsequence_len: 200\nmicro_batch_size: 4\nflash_attention: true\n"
        "output_dir: out\n"
    )
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["train", "ax.yml", "--max-steps", "2"])
    assert done.exit_code == 0, done.output
    for words in ("ax.yml is a file of axolotl. It is read as:", "micro_batch_size: 4",
                  "per_device_train_batch_size: 4", "speed or memory only", "r 4, alpha 8", "2 of 4 rows"):  # fmt: skip
        assert words in done.output, words
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    done = CliRunner().invoke(app, ["train", "ax.yml", "--adapter", "x"])
    assert done.exit_code == 2
