"""Merging into a folder: what is saved computes what base and adapters compute, or nothing is saved."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.folders import adapter_folder, base_folder
from trimtab import IA3Config, LoraConfig, PromptTuningConfig
from trimtab.errors import AdapterFileError, ExportError
from trimtab.export.merge import RECEIPT, merge
from trimtab.shell.opening import open_model

IDS = torch.tensor([[1, 5, 9, 30, 77]])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("merging")
    base_folder(root / "base")
    adapter_folder(root / "one", root / "base", 1)
    adapter_folder(root / "two", root / "base", 2)
    return root


def opened(root, *adapters, **more):
    return open_model(root / "base", [str(root / a) for a in adapters], **{"dtype": "auto", **more})


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits.float()


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_saved_model_is_the_merged_one_with_tokenizer_and_receipt(root, tmp_path) -> None:
    unmerged = logits(opened(root, "one").model)
    receipt = merge(opened(root, "one"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(root / "base").chat_template
    assert 0 < receipt.drift_mean <= receipt.drift_largest < 1e-3
    assert receipt.same_choice == 1.0
    assert receipt.path == ["float32", "float32", "float32"]
    assert receipt.tokenizer
    assert receipt.template
    assert receipt.lost is None
    assert json.loads((tmp_path / "out" / RECEIPT).read_text()) == json.loads(json.dumps(receipt.__dict__))
    assert receipt.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != RECEIPT)
    assert left_behind(tmp_path) == ["out"]


def test_the_drift_is_between_unmerged_and_saved(root, tmp_path) -> None:
    text = "The drift of this text"
    one = opened(root, "one")
    ids = torch.tensor([one.tokenizer(text).input_ids])
    before = logits(one.model, ids)
    receipt = merge(one, tmp_path / "out", prompts=[text], dtype="bfloat16")
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), ids)
    assert receipt.path == ["float32", "float32", "bfloat16"]
    assert receipt.drift_largest == pytest.approx(float((before - after).abs().max()))
    assert receipt.drift_mean == pytest.approx(float((before - after).abs().mean()))
    assert receipt.drift_largest > 1e-3
    assert receipt.positions == ids.shape[1]


def test_several_adapters_add_up(root, tmp_path) -> None:
    both = opened(root, "one", "two")
    both.model.set_adapter(["one", "two"])
    expected = logits(both.model)
    receipt = merge(opened(root, "one", "two"), tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3
    )
    assert list(receipt.sha256) == ["one", "two"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=["DoRA", "embedding and head", "IA3"],
)
def test_other_adapters(root, tmp_path, config) -> None:
    adapter_folder(tmp_path / "x", root / "base", config=config)
    expected = logits(open_model(tmp_path / "x").model)
    merge(open_model(tmp_path / "x", dtype="auto"), tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3
    )


def test_a_tied_base_stays_whole(tmp_path) -> None:
    base_folder(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    adapter_folder(tmp_path / "x", tmp_path / "base", config=config)
    expected = logits(open_model(tmp_path / "x").model)
    merge(open_model(tmp_path / "x", dtype="auto"), tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3
    )


def test_without_a_tokenizer(root, tmp_path) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    receipt = merge(open_model(tmp_path / "base", [str(root / "one")], dtype="auto"), tmp_path / "out")
    assert not receipt.tokenizer
    assert receipt.positions == 64


# ---------------------------------------------------------------------- refused, and nothing is left
def test_all_that_is_wrong_is_said_at_once(root, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ExportError) as error:
        merge(opened(root), tmp_path / "out", dtype="int3")
    assert all(words in str(error.value) for words in ("nothing to merge", "'int3'", "is there already"))
    assert left_behind(tmp_path / "out") == ["mine.txt"]
    adapter_folder(
        tmp_path / "p", root / "base", config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ExportError, match="prompt in front of the model"):
        merge(open_model(tmp_path / "p"), tmp_path / "new")


def test_overwriting_replaces_the_folder(root, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    merge(opened(root, "one"), tmp_path / "out", overwrite=True)
    assert "old.txt" not in left_behind(tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]


def test_no_room_on_the_disk(root, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_000_000))
    with pytest.raises(ExportError, match=r"has 1 MB free; the merged model takes 20 MB\. Nothing is written"):
        merge(opened(root, "one"), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(root, tmp_path) -> None:
    """The system itself stops the write, in a process of its own."""
    code = (
        "import resource, signal, sys\n"
        "from trimtab.shell.opening import open_model\nfrom trimtab.export.merge import merge\n"
        "opened = open_model(sys.argv[1], dtype='auto')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: merge(opened, sys.argv[2])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root / "one"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("ExportError The merged model could not be written"), done.stdout + done.stderr
    assert left_behind(tmp_path) == []


def test_nan_is_not_saved(root, tmp_path) -> None:
    shutil.copytree(root / "one", tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="NaN"):
        open_model(root / "base", [str(tmp_path / "one")], dtype="auto")
    shutil.copytree(root / "one", tmp_path / "two")
    opened = open_model(root / "base", [str(tmp_path / "two")], dtype="auto")
    with torch.no_grad():
        next(p for n, p in opened.model.named_parameters() if "lora_A" in n).fill_(math.nan)
    with pytest.raises(ExportError, match="not finite"):
        merge(opened, tmp_path / "out")
    assert left_behind(tmp_path) == ["one", "two"]


# ---------------------------------------------------------------------- quantised bases
@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    root = tmp_path_factory.mktemp("nf4")
    base_folder(root / "plain", hidden_size=64, intermediate_size=128)
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(root / "plain", quantization_config=quant).save_pretrained(root / "base")
    adapter_folder(root / "one", root / "plain", size=0.05)
    return root


def test_a_quantised_base_is_refused_with_the_ways_out(nf4, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"is quantised.*--dequantise.*trimtab\.dequantize.*--allow-quantised"):
        merge(opened(nf4, "one"), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_dequantised_it_merges_like_any_other(nf4, tmp_path) -> None:
    receipt = merge(opened(nf4, "one"), tmp_path / "out", dequantise=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not getattr(model, "is_quantized", False)
    assert receipt.lost is None
    assert receipt.drift_largest < 0.05 * receipt.logit_scale


def test_allowed_it_says_what_rounding_took(nf4, tmp_path) -> None:
    plain = merge(opened(nf4, "one"), tmp_path / "plain", dequantise=True)
    receipt = merge(opened(nf4, "one"), tmp_path / "out", allow_quantised=True)
    assert receipt.lost > 0.1
    assert receipt.drift_largest > plain.drift_largest
