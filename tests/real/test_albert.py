"""A trained ALBERT (the one in the package `rxnmapper`, 3 MB): one group of weights that is used twelve times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from trimtab.files.sources import PackagedModel, packaged

pytestmark = pytest.mark.slow  # the package is downloaded at first

ALBERT = PackagedModel(
    name="test-albert-rxn",
    requirement="rxnmapper==0.4.3",
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    member="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    needs=10_000_000,
)
REACTIONS = [
    "C C O . C C ( = O ) O >> C C ( = O ) O C C",
    "C O . C C C ( = O ) O >> C C C ( = O ) O C",
    "N C . C C ( = O ) Cl >> C C ( = O ) N C",
    "C C N . C C ( = O ) Cl >> C C ( = O ) N C C",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(packaged(ALBERT))


def base(folder: Path) -> Any:
    from transformers import AlbertConfig, AlbertForMaskedLM

    model = AlbertForMaskedLM(AlbertConfig.from_pretrained(folder))
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not [n for n in missing if "layer_groups" in n], "the weights in the package fit the model"
    assert not [n for n in unexpected if "layer_groups" in n]
    return model.eval()


def batch(folder: Path) -> dict[str, Tensor]:
    """The reactions, every fourth token masked; the labels are what was there."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    known = {word: i for i, word in enumerate(words)}
    rows = [[known[w] for w in text.split()] for text in REACTIONS]
    ids = torch.tensor([row[:14] for row in rows])
    labels = torch.full_like(ids, -100)
    labels[:, 1::4] = ids[:, 1::4]
    return {"input_ids": ids.where(labels == -100, torch.tensor(known["[MASK]"])), "labels": labels}


CONFIGS = [
    LoraConfig(r=4, target_modules=["query", "value", "ffn"]),
    LoraConfig(r=4, target_modules=["query", "ffn_output"], use_dora=True),
    LoHaConfig(r=2, target_modules=["query", "value"]),
    OFTConfig(oft_block_size=8, target_modules=["query", "dense"]),
    IA3Config(target_modules=["key", "value", "ffn_output"], feedforward_modules=["ffn_output"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type.value}{'-dora' * getattr(c, 'use_dora', 0)}")
def test_trained_merged_saved_loaded(config: Any, folder: Path, tmp_path: Path) -> None:
    model, inputs, plain = get_peft_model(base(folder), config), batch(folder), base(folder)
    assert model.get_base_model().config.num_hidden_layers == 12
    adapted = [n for n in model.base_model.targeted_module_names if n.endswith(("query", "key", "value"))]
    assert len(adapted) <= 2, "each layer of the group is adapted once, however often it is used"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    out = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(folder), tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, out)
    mixed = loaded(**inputs, adapter_names=["default", "__base__", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[::2], out[::2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1::2], plain(**inputs).logits[1::2], rtol=1e-3, atol=1e-3)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**inputs).logits, out, rtol=1e-3, atol=1e-3)
    loaded.unmerge_adapter()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(model.unload()(**inputs).logits, plain(**inputs).logits)


def test_gradients_are_the_sum_over_its_uses(folder: Path) -> None:
    """Of LoRA's B on the one query layer, against what changes when B is moved."""
    model, inputs = get_peft_model(base(folder), CONFIGS[0]).double().eval(), batch(folder)
    (layer,) = [m for n, m in model.named_modules() if n.endswith("attention.query")]
    B = layer.lora_B["default"].weight
    model(**inputs).loss.backward()
    move = torch.randn(B.shape, generator=torch.Generator().manual_seed(0)).double()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            B.add_(sign * 1e-6 * move)
            sides.append(float(model(**inputs).loss))
            B.sub_(sign * 1e-6 * move)
    assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(float((B.grad * move).sum()), rel=1e-4)
