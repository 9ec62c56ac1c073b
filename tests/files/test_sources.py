"""Base models out of folders, GGUF files and packages: made once, whole, and only from the file we know.

No network: pip is pointed at a folder of wheels that the tests build.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.errors import MissingPackageError
from trimtab.files import sources
from trimtab.files.sources import (
    PACKAGED,
    BaseModelError,
    PackagedModel,
    cache_folder,
    packaged,
    packaged_name,
    resolve_base,
)

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model as llama.cpp would store it, half of it in Q8_0, with a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Hi", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }  # fmt: skip
    for name, p in model.named_parameters():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        w = p.detach()
        if heads:  # llama.cpp keeps the two halves of each head's rotation interleaved
            w = w.view(heads, 2, w.shape[0] // heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in name and w.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(w.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same_model(folder: str, expected: LlamaForCausalLM) -> None:
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert found.dtype == torch.float32
    assert not hasattr(found.config, "quantization_config")
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 if "mlp" in name else 0, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi<|im_end|>"
    assert tokenizer(text).input_ids == [258, 256, 259]
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is pip's only source."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def build_wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """A wheel with these files; returns its sha256."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in files.items():
            archive.writestr(inside, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder_model(wheels) -> PackagedModel:
    """A model in Hugging Face layout, as the MiniLM package has it."""
    files = {"pkg/model/config.json": b"{}", "pkg/model/1_Pooling/config.json": b"[]", "pkg/models.py": b""}
    sha = build_wheel(wheels, "tinyfolder", files)
    return PackagedModel("tiny-folder", "tinyfolder==1.0", sha, "pkg/model", needs=1)


# --- what resolves to itself ---


def test_folders_and_hub_ids_are_left_alone(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "also.gguf").write_bytes(b"")
    assert resolve_base(tmp_path) == str(tmp_path)
    assert resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_base("gpt2") == "gpt2"
    (tmp_path / "adapter").mkdir()
    assert resolve_base(str(tmp_path / "adapter")) == str(tmp_path / "adapter")


def test_a_folder_wins_over_a_packaged_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-l6-v2").mkdir()
    assert resolve_base("minilm-l6-v2") == "minilm-l6-v2"


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("smollm2-135m", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("minilm", "minilm-l6-v2"),
        ("smollm", "smollm"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_beginning_of_a_packaged_name(asked, name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged_name(asked) == name


def test_the_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "trimtab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("TRIMTAB_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


# --- GGUF ---


def test_a_gguf_file_becomes_a_folder_once(tiny, tmp_path) -> None:
    cache = tmp_path / "cache"
    file = tmp_path / "model" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(tiny, file)
    folder = resolve_base(file, cache)
    same_model(folder, tiny)
    stamp = Path(folder, "config.json").stat().st_mtime_ns
    assert resolve_base(file.parent, cache) == folder  # by its folder too
    assert Path(folder, "config.json").stat().st_mtime_ns == stamp

    began = time.perf_counter()
    resolve_base(file, cache)
    assert time.perf_counter() - began < 0.1

    os.utime(file, (1, 1))  # another file now, as far as one can tell
    assert resolve_base(file, cache) != folder
    (file.parent / "second.gguf").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"several GGUF files: second\.gguf, tiny\.gguf"):
        resolve_base(file.parent, cache)


def test_a_gguf_that_is_missing_or_damaged(tmp_path) -> None:
    with pytest.raises(BaseModelError, match="no file"):
        resolve_base(tmp_path / "no.gguf", tmp_path)
    for rest in (bytes(100), b"", b"\xff" * 40):
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + rest)
        with pytest.raises(BaseModelError, match=r"could not read bad\.gguf"):
            resolve_base(tmp_path / "bad.gguf", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_reading_a_gguf_file_needs_is_asked_for_before_a_download(missing, tiny, tmp_path, monkeypatch) -> None:
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, missing, None)
    said: list[str] = []
    with pytest.raises(MissingPackageError, match=rf"needs {missing}, .*pip install 'trimtab\[demo\]'"):
        resolve_base(tmp_path / "any.gguf", tmp_path / "cache")
    with pytest.raises(MissingPackageError, match=rf"tiny-file.* needs {missing}, "):
        packaged(PackagedModel("tiny-file", "tiny==1.0", "0" * 64, "tiny/t.gguf", 1), tmp_path / "cache", said.append)
    assert not said


# --- packages ---


def test_a_packaged_gguf(tiny, tmp_path, wheels) -> None:
    write_gguf(tiny, tmp_path / "t.gguf")
    sha = build_wheel(wheels, "tinypkg", {"tinypkg/t.gguf": (tmp_path / "t.gguf").read_bytes()})
    model = PackagedModel("tiny", "tinypkg==1.0", sha, "tinypkg/t.gguf", needs=1)
    said: list[str] = []
    folder = packaged(model, tmp_path / "cache", said.append)
    assert folder == str(tmp_path / "cache" / "tiny")
    same_model(folder, tiny)
    assert said[0] == "Downloading tinypkg==1.0"
    assert said[-1] == f"Stored in {folder}"
    said.clear()
    began = time.perf_counter()
    assert packaged(model, tmp_path / "cache", said.append) == folder
    assert time.perf_counter() - began < 0.1
    assert not said


def test_a_packaged_folder(folder_model, tmp_path) -> None:
    folder = Path(packaged(folder_model, tmp_path / "cache"))
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json")) == [
        "1_Pooling/config.json",
        "config.json",
        "source.json",
    ]
    assert not list(folder.glob("*.py"))


def test_a_wheel_with_another_hash_is_not_used(folder_model, tmp_path) -> None:
    wrong = PackagedModel(**{**vars(folder_model), "sha256": "0" * 64})
    with pytest.raises(BaseModelError, match="DO NOT MATCH THE HASHES") as e:
        packaged(wrong, tmp_path / "cache")
    assert folder_model.sha256 in str(e.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_a_package_that_cannot_be_had(folder_model, wheels, tmp_path) -> None:
    (wheels / "tinyfolder-1.0-py3-none-any.whl").unlink()
    with pytest.raises(BaseModelError, match="Is there a network") as e:
        packaged(folder_model, tmp_path / "cache")
    assert "No matching distribution found for tinyfolder==1.0" in str(e.value)  # pip's own words


@pytest.fixture
def no_pip(tmp_path, monkeypatch) -> Path:
    """An environment without pip, as uv makes them, and a PATH that is one empty folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("UV", raising=False)
    return tmp_path / "bin"


def command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_pip_and_uv_the_error_says_what_to_do(folder_model, no_pip, tmp_path) -> None:
    with pytest.raises(BaseModelError, match=r"neither pip nor uv .* -m ensurepip.*put uv on PATH"):
        packaged(folder_model, tmp_path / "cache")


def test_without_pip_another_pythons_pip_fetches(folder_model, no_pip, tmp_path) -> None:
    command(no_pip / "pip3", f'exec {sys.executable} -m pip "$@"')
    assert Path(packaged(folder_model, tmp_path / "cache"), "config.json").is_file()


def test_without_pip_uv_fetches_into_this_python(folder_model, no_pip, tmp_path, monkeypatch) -> None:
    """uv may not be here: a script stands for it, checks how it is called, and hands the options both know to pip."""
    command(no_pip / "pip", "exit 1")
    uv = tmp_path / "uv"  # not on PATH: `uv run` says where it is
    command(uv, f'[ "$1 $2 $3 $4" = "pip install --python {sys.executable}" ] || exit 2\n'
                f'shift 4; exec {sys.executable} -m pip install "$@"')  # fmt: skip
    monkeypatch.setenv("UV", str(uv))
    assert Path(packaged(folder_model, tmp_path / "cache"), "config.json").is_file()
    uv.rename(no_pip / "uv")
    monkeypatch.delenv("UV")
    assert Path(packaged(folder_model, tmp_path / "other"), "config.json").is_file()


def test_a_pip_that_installs_for_the_user_fetches_too(folder_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    assert Path(packaged(folder_model, tmp_path / "cache"), "config.json").is_file()


def test_a_wheel_without_the_member(folder_model, tmp_path) -> None:
    with pytest.raises(BaseModelError, match="holds no pkg/other"):
        packaged(PackagedModel(**{**vars(folder_model), "member": "pkg/other"}), tmp_path / "cache")


def test_too_little_disk(folder_model, tmp_path) -> None:
    with pytest.raises(BaseModelError, match="MB free; making tiny-folder takes 1,000,000,000,000 MB"):
        packaged(PackagedModel(**{**vars(folder_model), "needs": 10**18}), tmp_path / "cache")


def test_a_cache_that_cannot_be_made(folder_model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match="Set TRIMTAB_CACHE"):
        packaged(folder_model, tmp_path / "file" / "cache")


def test_what_a_killed_run_left_is_cleared_and_a_damaged_folder_made_anew(folder_model, tmp_path) -> None:
    cache = tmp_path / "cache"
    (cache / ".tiny-folder.abc.part").mkdir(parents=True)
    (cache / ".other.abc.part").mkdir()
    (cache / "tiny-folder").mkdir()  # no config.json in it
    packaged(folder_model, cache)
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == [".other.abc.part", "tiny-folder"]
    assert (cache / "tiny-folder" / "config.json").exists()


def test_two_at_once_make_it_once(folder_model, tmp_path) -> None:
    said: list[str] = []
    folders: list[str] = []
    both = [
        threading.Thread(target=lambda: folders.append(packaged(folder_model, tmp_path / "cache", said.append)))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert folders == [str(tmp_path / "cache" / "tiny-folder")] * 2
    assert said.count("Downloading tinyfolder==1.0") == 1
    assert "Another process is making tiny-folder: waiting for it" in said


def test_the_table_of_packaged_models() -> None:
    assert set(PACKAGED) == {"smollm2-135m-instruct", "minilm-l6-v2"}
    for name, model in PACKAGED.items():
        assert name == model.name
        assert "==" in model.requirement
        assert len(model.sha256) == 64
    assert set(sources.__all__) <= set(dir(sources))
