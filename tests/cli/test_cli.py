"""The command: quick help, one message for an error, and the demo from end to end on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from trimtab.cli import app
from trimtab.cli.verbs import GROUPS, VERBS

MAIN = [sys.executable, "-c", "import sys; sys.argv[0] = 'trimtab'; from trimtab.cli import main; main()"]


def trimtab(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **env}
    return subprocess.run([*MAIN, *args], capture_output=True, text=True, check=False, env=whole)


@pytest.mark.parametrize("verb", [*GROUPS, *VERBS])
def test_help_imports_one_verb_and_nothing_heavy(verb) -> None:
    """Neither the libraries that do the work, nor those by which typer reads values and draws its own help."""
    code = (
        f"import sys; from trimtab.cli import main; sys.argv = ['trimtab', *{verb.split()}, '--help']; main()\n"
        "heavy = 'torch transformers safetensors huggingface_hub numpy accelerate yaml pydantic pygments'\n"
        "print(set(heavy.split()) & set(sys.modules), file=sys.stderr)\n"
        "print({m for m in sys.modules if m.startswith('trimtab.cli.')}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, ours = map(eval, done.stderr.splitlines())
    assert not heavy
    place = {f"trimtab.cli.{VERBS[verb].place.partition(':')[0]}"} if verb in VERBS else set()
    shared = {f"trimtab.cli.{name}" for name in ("verbs", "help", "common", "options", "quiet")}
    assert place <= ours <= place | shared
    assert f"trimtab {verb}".strip() in done.stdout
    assert "--help" in done.stdout


def test_help_names_the_verbs_and_is_the_same_by_every_way() -> None:
    whole = trimtab("--help").stdout.strip()
    assert all(f" {name} " in whole for name in VERBS if " " not in name and name != "fuse")
    assert trimtab().stdout.strip() == whole
    assert trimtab("rank").stdout.strip() == trimtab("rank", "--help").stdout.strip()
    built = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "120"})  # past the short cut of `main`
    for args in (["--help"], ["rank", "mend", "--help"], ["merge", "x", "--output", "y", "--help"]):
        assert built.invoke(app, args).output.strip() == trimtab(*args).stdout.strip()
    assert trimtab("nonsense", "--help").returncode == trimtab("rank", "nonsense", "--help").returncode == 2


def test_version() -> None:
    assert trimtab("--version").stdout.strip() == version("trimtab")
    lines = trimtab("version").stdout.splitlines()
    assert lines[0] == f"trimtab {version('trimtab')}"
    assert f"torch {version('torch')}" in lines


def test_an_unknown_option_and_a_missing_file_are_one_message(tmp_path) -> None:
    done = trimtab("demo", "--rowz", "3")
    assert done.returncode == 2
    assert "--rowz" in done.stderr
    done = trimtab("demo", "--model", str(tmp_path / "no.gguf"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"trimtab: There is no file {tmp_path / 'no.gguf'}."


@pytest.fixture
def tiny_base(tmp_path):
    """A random Llama with a byte tokenizer and a chat template, and rows to learn."""
    torch.manual_seed(0)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}{{ eos_token }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=256, bos_token_id=None, pad_token_id=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(16)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def demo(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The demo on the tiny model, three passes over its rows."""
    places = {"--model": "base", "--data": "data", "--out": "out"}
    words = [word for option, name in places.items() for word in (option, str(folder / name))]
    return trimtab("demo", *words, "--epochs", "3", *more)


def test_the_demo_from_end_to_end(tiny_base) -> None:
    out = tiny_base / "out"
    done = demo(tiny_base)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("trainable params:", "held-out loss", "exact match", "before", "after", "times as large", "loss.png"):
        assert words in done.stdout, words
    assert "AutoPeftModelForCausalLM.from_pretrained" in done.stdout
    assert "generated the same" in done.stdout
    assert all(words in done.stderr for words in ("step 12/12", "tokens/s", "left"))
    lines = done.stderr.splitlines()  # our own lines only, none twice
    assert [line for line in lines if not re.match(r"Training  step \d|step \d+: held-out loss \d", line)] == []
    assert len(set(lines)) == len(lines)
    assert re.search(r"trains on 16 rows in about \d+:\d\d", done.stdout)
    assert re.search(r"Expect about \d+:\d\d \(min:s\) more", done.stdout)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 12 + 4  # 12 steps, 4 evaluations
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(tiny_base / "base"))
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_demo_again_with_fewer_rows_and_others_bars(tiny_base) -> None:
    done = demo(tiny_base, "--rows", "4", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 rows x 3 passes" in done.stdout
    assert "Loading weights" in done.stderr


def test_the_demo_of_tasks_on_a_tiny_model(tiny_base) -> None:
    for task, answer in (("sums", "{}"), ("echoes", "yes"), ("json", '{{"a": {}}}')):
        folder = tiny_base / "tasks" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"prompt": f"{task} {i}", "completion": answer.format(i)} for i in range(12)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tiny_base / "many"
    args = ["--model", str(tiny_base / "base"), "--data", str(tiny_base / "tasks"), "--out", str(out)]
    done = trimtab("demo", "--tasks", *args, "--rows", "8", "--epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "One task after the other",
        "All at once",
        "field f1",
        "One batch of 12 rows, 3 adapters",
        "the base",
    ):
        assert words in done.stdout, words
    for task in ("sums", "echoes", "json"):
        assert (out / task / "adapter" / "adapter_model.safetensors").is_file()
