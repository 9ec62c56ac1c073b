"""What `inspect_ranks` finds: against the SVD of the dense delta, from files alone and through the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.models import assert_untouched, llama, mixtral, snapshot, toy
from tests.rank.adapters import LAYERS, dense, lora, saved, stirred
from tests.rank.test_adapter_file import EXPERTS, edit
from trimtab import inspect_ranks
from trimtab.errors import AdapterFileError
from trimtab.files.codec import PREFIX
from trimtab.rank.survey import by_module, medians, module_of


def check(found: Any, deltas: dict[str, torch.Tensor]) -> None:
    assert {x.path for x in found.layers} == deltas.keys()
    for layer in found.layers:
        D = deltas[layer.path]
        S = torch.linalg.svdvals(D)
        S = S if D.ndim == 2 else S.square().sum(0).sqrt()
        assert layer.shape == tuple(D.shape)
        assert layer.norm == pytest.approx(float(D.norm()), rel=1e-4)
        assert layer.values == pytest.approx(S[: len(layer.values)].tolist(), rel=1e-3)
        assert S[len(layer.values) :].sum() < 1e-4 * S[0]
        held = S.square().cumsum(0) / S.square().sum()
        assert layer.effective.energy90 == int((held < 0.9).sum()) + 1
        assert layer.effective.energy99 == int((held < 0.99).sum()) + 1
        assert layer.effective.stable == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-3)
        p = S[: len(layer.values)] / S[: len(layer.values)].sum()
        assert layer.effective.entropy == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-3)


@pytest.mark.parametrize("through", ["files", "files and base", "the model"])
def test_a_lora(through: str, tmp_path: Path) -> None:
    model = lora(target_modules=LAYERS, rank_pattern={"up": 3}, alpha_pattern={"head": 2})
    deltas, source = dense(model), saved(tmp_path, model)
    found = {
        "files": lambda: inspect_ranks(source),
        "files and base": lambda: inspect_ranks(source, toy()),
        "the model": lambda: inspect_ranks(model),
    }[through]()
    check(found, deltas)
    for layer in found.layers:
        own = model.peft_config["default"].resolve(layer.path)
        assert (layer.rank, layer.alpha, layer.scale) == (own.r, own.lora_alpha, own.scaling())
        assert (layer.relative is None) == (layer.intruders is None) == (through == "files")
    W = {n: m.weight for n, m in toy().named_modules() if n in LAYERS}
    if through != "files":
        assert found.layers[0].relative == pytest.approx(
            found.layers[0].norm / float(W[found.layers[0].path].detach().norm())
        )
    assert found.method == "LORA"
    assert found.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


METHODS = {
    "loha": trimtab.LoHaConfig(r=2, target_modules=["up", "head", "conv"]),
    "oft": trimtab.OFTConfig(oft_block_size=2, target_modules=["up"]),
    "ia3": trimtab.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "vera": trimtab.VeraConfig(r=3, target_modules=["up"]),
    "adalora": trimtab.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up"]),
    "dora": trimtab.LoraConfig(r=2, use_dora=True, target_modules=["up", "embed"]),
    "tokens": trimtab.LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 3]}),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())
def test_other_methods_through_the_model(config: Any, tmp_path: Path) -> None:
    model = stirred(trimtab.get_peft_model(toy(), config))
    base = toy()
    before = snapshot(base)
    found = inspect_ranks(saved(tmp_path, model), base)
    check(found, dense(model))
    assert_untouched(base, before)
    if config.peft_type != "LORA":
        with pytest.raises(AdapterFileError, match="Give its base"):
            inspect_ranks(tmp_path)


def test_what_the_files_leave_out_is_said(tmp_path: Path) -> None:
    assert inspect_ranks(saved(tmp_path / "a", target_modules=["up"])).note == ""
    assert "magnitude" in inspect_ranks(saved(tmp_path / "b", target_modules=["up"], use_dora=True)).note
    found = inspect_ranks(saved(tmp_path / "c", target_modules=["up"], init_lora_weights="olora"))
    assert "'olora'" in found.note
    found = inspect_ranks(saved(tmp_path / "d", target_modules=["up"], modules_to_save=["norm"], lora_bias=True))
    assert found.other == 6 + 6 + 10


def test_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(mixtral(), **EXPERTS)
    check(inspect_ranks(saved(tmp_path, model)), dense(model))


def test_layers_come_in_order_and_by_module(tmp_path: Path) -> None:
    base = llama(num_hidden_layers=11)
    found = inspect_ranks(
        saved(tmp_path, lora(base, target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]))
    )
    assert [x.layer for x in found.layers[2:]] == [i for i in range(11) for _ in range(2)]
    assert {x.layer for x in found.layers[:2]} == {None}
    groups = by_module(found.layers, lambda x: x.path)
    assert list(groups) == ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    assert [len(x) for x in groups.values()] == [11, 11, 1, 1]
    curve = medians(groups["q_proj"])
    assert curve[0] == 1
    assert curve == sorted(curve, reverse=True)
    assert len(curve) == 4
    assert medians([]) == []


def test_modules_have_the_shortest_names_that_tell_them_apart() -> None:
    """Two stacks with layers of one name, as T5 has, are not one."""
    assert module_of("encoder.block.12.layer.0.q") == (12, "encoder.block.*.layer.0.q")
    assert module_of("lm_head") == (None, "lm_head")
    paths = ["head", *(f"{s}.block.{i}.layer.{j}.{n}" for i in (0, 1) for s in ("encoder", "decoder")
                       for j, n in ((0, "q"), (0, "v"), (1, "q")))]  # fmt: skip
    paths += [f"decoder.block.{i}.layer.2.wi" for i in (0, 1)]
    found = by_module(paths, lambda p: p)
    assert found["wi"] == ["decoder.block.0.layer.2.wi", "decoder.block.1.layer.2.wi"]
    assert found["encoder.block.*.layer.0.q"] == ["encoder.block.0.layer.0.q", "encoder.block.1.layer.0.q"]
    assert list(found)[-1] == "head"
    assert sum(map(len, found.values())) == len(paths)


def test_degenerate_files(tmp_path: Path) -> None:
    """Zeros have no rank; what is not finite is named."""
    edit(saved(tmp_path, target_modules=["up", "head"]), lambda t: t[f"{PREFIX}up.lora_B.weight"].zero_())
    up = next(x for x in inspect_ranks(tmp_path).layers if x.path == "up")
    assert (up.norm, up.values) == (0.0, ())
    assert (up.effective.energy90, up.effective.entropy) == (0, 0.0)
    assert inspect_ranks(tmp_path, toy()).layers
    edit(tmp_path, lambda t: t[f"{PREFIX}head.lora_A.weight"].fill_(math.nan))
    with pytest.raises(AdapterFileError, match="'head' has a NaN"):
        inspect_ranks(tmp_path)
    with pytest.raises(AdapterFileError, match="NaN"):
        inspect_ranks(tmp_path, toy())


def test_prompts_have_no_rank(tmp_path: Path) -> None:
    config = trimtab.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(AdapterFileError, match="no rank"):
        inspect_ranks(trimtab.get_peft_model(llama(), config))
