"""What engines make of an adapter: each rule by a config that has what it is about."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.folders import adapter_folder, base_folder
from trimtab import BitFitConfig, IA3Config, LoraConfig, PeftConfig
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.export.check import check_adapter, check_config
from trimtab.export.rules import ENGINES

WEIGHTS = "adapter_model.safetensors"


def lora(**more):
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more})


LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
ENGINE_NAMES = ("vllm", "llama.cpp", "ollama", "mlx", "peft")

# what an adapter has -> (its config, the verdicts of: vllm, llama.cpp, ollama, mlx, peft; "" is none)
CASES = {
    "nothing special": (lora(), "", "", "", "", ""),
    "rank above 16": (lora(r=40), "needs", "", "", "", ""),
    "rank above 512": (lora(r=600), "refused", "", "", "", ""),
    "rank above 16 in one layer": (lora(rank_pattern={"q_proj": 64}), "needs", "", "", "refused", ""),
    "rslora": (lora(use_rslora=True), "", "wrong", "wrong", "", ""),
    "alpha_pattern": (lora(alpha_pattern={"q_proj": 4}), "", "wrong", "wrong", "wrong", ""),
    "DoRA": (lora(use_dora=True), "refused", "refused", "refused", "", ""),
    "lora_bias": (lora(lora_bias=True), "refused", "refused", "refused", "refused", ""),
    "bias": (lora(bias="all"), "refused", "refused", "refused", "refused", ""),
    "PiSSA": (lora(init_lora_weights="pissa_niter_4"), "refused", "wrong", "wrong", "wrong", ""),
    "KaSA": (lora(kasa_config={}), "wrong", "wrong", "wrong", "wrong", ""),
    "Arrow": (lora(arrow_config={}), "wrong", "wrong", "wrong", "wrong", ""),
    "a method that PEFT lacks": (BitFitConfig(), "refused", "refused", "refused", "refused", "refused"),
    "OLoRA": (lora(init_lora_weights="olora"), "refused", "wrong", "wrong", "wrong", ""),
    "gaussian start": (lora(init_lora_weights="gaussian"), "", "", "", "", ""),
    "classifier": (lora(modules_to_save=["score"]), "", "refused", "refused", "refused", ""),
    "whole head": (lora(modules_to_save=["lm_head"]), "refused", "refused", "refused", "refused", ""),
    "whole norms": (lora(modules_to_save=["input_layernorm"]), "refused", "wrong", "refused", "refused", ""),
    "trained tokens": (lora(trainable_token_indices=[3]), "refused", "refused", "refused", "refused", ""),
    "head adapted": (lora(target_modules=["q_proj", "lm_head"]), "needs", "", "refused", "", ""),
    "odd modules": (lora(target_modules=["qkv_proj"]), "", "", "refused", "", ""),
    "experts": (lora(target_parameters=["gate_up_proj"]), "wrong", "refused", "refused", "refused", ""),
    "experts with dropout": (
        lora(target_parameters=["gate_up_proj"], lora_dropout=0.1), "wrong", "refused", "refused", "refused", "refused",
    ),
    "alpha of half": (lora(lora_alpha=8.5), "", "", "refused", "", ""),
    "another method": (
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "refused", "refused", "refused", "refused", "",
    ),
}  # fmt: skip
RANK = {"": 0, "needs": 1, "wrong": 2, "refused": 3}


@pytest.mark.parametrize("case", CASES)
def test_verdicts_before_training(case) -> None:
    config, *expected = CASES[case]
    found = check_config(config, base=LLAMA)
    worst = {e: max((f.verdict for f in found if f.engine == e), key=RANK.get, default="") for e in ENGINE_NAMES}
    assert list(worst.values()) == expected
    assert all(f.what and f.fix for f in found)


def test_the_rank_to_ask_vllm_for_and_the_alpha_that_mends_rslora() -> None:
    (found,) = check_config(lora(r=40), engines=["vllm"])
    assert (found.fix, found.fault) == ("vllm serve --max-lora-rank 64", False)
    (found,) = check_config(lora(r=16, lora_alpha=32, use_rslora=True), engines=["llama.cpp"])
    assert "lora_alpha 128" in found.fix  # 128 / 16 = 32 / sqrt(16)
    assert "4.0 times too weak" in found.what


def test_what_is_known_of_the_base_counts() -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    head = lora(target_modules=["lm_head"])
    assert [f.verdict for f in check_config(head, engines=["llama.cpp"], base=tied)] == ["refused"]
    assert not check_config(head, engines=["llama.cpp"], base=LLAMA)
    embedding = lora(target_modules=["embed_tokens"])
    assert [f.verdict for f in check_config(embedding, engines=["llama.cpp"], base=tied)] == ["refused"]
    assert not check_config(embedding, engines=["llama.cpp"], base=LLAMA)
    (found,) = check_config(head, engines=["llama.cpp"], base={})
    assert "where the base ties them" in found.what
    assert check_config(lora(), engines=["ollama"], base={"model_type": "qwen3"})[0].verdict == "refused"
    assert check_config(lora(), engines=["ollama"])[0].verdict == "needs"


def test_targets_are_looked_at_where_they_are_given() -> None:
    config = lora(target_modules="all-linear")
    assert not check_config(config, engines=["ollama"], base=LLAMA)
    paths = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.router"]
    assert "router" in check_config(config, paths, ["ollama"], LLAMA)[0].what


def test_a_plain_dict_does_and_every_engine_is_known() -> None:
    assert not check_config({"peft_type": "LORA", "r": 8}, engines=["vllm", "peft"])
    assert check_config({"peft_type": "NEW"}, engines=["peft"])[0].verdict == "refused"
    assert tuple(ENGINES) == ENGINE_NAMES
    with pytest.raises(ConfigError, match=r"No rules for tgi\. Known: vllm, llama\.cpp, ollama, mlx, peft"):
        check_config(lora(), engines=["tgi"])
    assert check_config(lora(r=64), engines=["vLLM", "vllm"]) == check_config(lora(r=64), engines=["vllm"])


# ---------------------------------------------------------------------- after training
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checking")
    base_folder(root / "base")
    adapter_folder(root / "a", root / "base")
    return root


def test_a_plain_adapter(root) -> None:
    found = {(f.engine, f.verdict) for f in check_adapter(root / "a")}
    assert found == {("llama.cpp", "needs"), ("mlx", "refused")}  # other layouts


def test_whole_embeddings_in_the_file(root, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from trimtab import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(root / "base")
    model.resize_token_embeddings(280)
    get_peft_model(model, lora()).save_pretrained(tmp_path / "x")
    found = check_adapter(tmp_path / "x", ["vllm", "llama.cpp"])
    assert {f.engine for f in found if f.verdict == "refused" and "whole embeddings" in f.what} == {"vllm", "llama.cpp"}


def test_convolutions(tmp_path) -> None:
    from tests.models import toy
    from trimtab import get_peft_model

    get_peft_model(toy(), LoraConfig(target_modules=["conv"])).save_pretrained(tmp_path)
    assert any("convolutions" in f.what for f in check_adapter(tmp_path, ["vllm"]))


def test_nan_is_wrong_everywhere(root, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text((root / "a" / "adapter_config.json").read_text())
    tensors = load_file(root / "a" / WEIGHTS)
    next(iter(tensors.values()))[0] = math.nan
    save_file(tensors, tmp_path / WEIGHTS)
    assert {f.engine for f in check_adapter(tmp_path) if "NaN" in f.what} == set(ENGINES)


def test_biases_that_are_not_in_the_file_are_no_reason(root, tmp_path) -> None:
    adapter_folder(tmp_path / "x", root / "base", config=lora(bias="all"))  # a Llama has none
    assert {f.verdict for f in check_adapter(tmp_path / "x", ["llama.cpp"])} == {"needs"}
    assert "refused" in {f.verdict for f in check_adapter(tmp_path / "x", ["vllm"])}  # it looks at the config alone


def test_no_adapter(root) -> None:
    with pytest.raises(AdapterFileError, match="whole model"):
        check_adapter(root / "base")


def test_the_mended_rslora_computes_the_same(root, tmp_path) -> None:
    """The fix that is named is right: same deltas, without the field that is ignored."""
    adapter_folder(tmp_path / "x", root / "base", config=lora(r=4, lora_alpha=6, use_rslora=True))
    (finding,) = [f for f in check_adapter(tmp_path / "x", ["llama.cpp"]) if f.verdict == "wrong"]
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    mended = {**config, "use_rslora": False, "lora_alpha": float(finding.fix.split("lora_alpha ")[1].split()[0])}
    scales = [PeftConfig.from_dict(c).scaling() for c in (config, mended)]
    torch.testing.assert_close(*map(torch.tensor, scales))
