"""Starts that need data, a gradient or quantised weights: EVA, CorDA, LoRA-GA, LoftQ."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.models import llama, tokens
from tests.parity.pairs import BOTH, near, quiet

TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture
def corda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's module, which wants a package `attr` for its `dataclass`."""
    attr = ModuleType("attr")
    attr.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attr", attr)
    import peft.tuners.lora.corda as module

    return module


def batches(count: int = 5, labels: bool = False) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        x = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
        if labels:
            batch["labels"] = x.clone()
            batch["labels"][:, :2] = -100
            batch["attention_mask"][0, -1] = 0
        found.append(batch)
    return found


def own(library: Any, name: str) -> Any:
    """PEFT has one of these classes in a module only."""
    return getattr(library, name, None) or getattr(peft.tuners.lora.config, name)


def lora(library: Any, start: str, base: nn.Module | None = None, **fields: Any) -> Any:
    config = quiet(library.LoraConfig, target_modules=TARGETS, init_lora_weights=start, **fields)
    return quiet(library.get_peft_model, base or llama(), config)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("labels", [False, True], ids=["all", "labelled"])
@pytest.mark.parametrize(
    ("eva", "fields"),
    [
        ({}, {"r": 4}),
        ({"rho": 1.5, "whiten": True, "tau": 0.5}, {"r": 4}),
        ({"rho": 3.0, "tau": 0.9}, {"r": 3, "lora_alpha": 5}),
        ({"rho": 4.0, "tau": 0.8, "adjust_scaling_factors": False}, {"r": 2, "lora_alpha": 5}),
        ({"rho": 8.0, "tau": 0.8}, {"r": 1}),
    ],
)
def test_eva(eva: dict[str, Any], fields: dict[str, Any], labels: bool) -> None:
    models = []
    for library in BOTH:
        model = lora(library, "eva", eva_config=library.EvaConfig(**eva), **fields)
        quiet(library.initialize_lora_eva_weights, model, batches(labels=labels), show_progress_bar=False)
        models.append(model)
    mine, yours = (m.peft_config["default"] for m in models)
    assert mine.rank_pattern == yours.rank_pattern
    assert mine.alpha_pattern == pytest.approx(yours.alpha_pattern)
    ours, theirs = map(numbers, models)
    assert {n for n in ours if "lora_" in n} == {n for n in theirs if "lora_" in n}
    for name, value in theirs.items():
        if "lora_A" in name and eva.get("whiten") and "_proj" in name and "down" not in name:
            value = value * value.norm(dim=1, keepdim=True) ** -0.5  # layers that share inputs are whitened twice there
        if "lora_" in name:
            near(ours[name], value, 2e-4)
    near(models[0](tokens(vocabulary=64)).logits, llama()(tokens(vocabulary=64)).logits)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"down_proj": 5}, "lora_alpha": 6}])
def test_corda(method: str, patterns: dict[str, Any], corda: Any, tmp_path: Path) -> None:
    """From data, and from each other's files."""
    found = []
    for library, prepare in zip(BOTH, (trimtab.preprocess_corda, corda.preprocess_corda), strict=True):
        for field in (None, "covariance_file", "cache_file"):  # the second library reads what the first has written
            base, files = llama(), {field: str(tmp_path / field)} if field else {}
            config = quiet(
                library.LoraConfig,
                target_modules=TARGETS,
                init_lora_weights="corda",
                corda_config=own(library, "CordaConfig")(corda_method=method, **files),
                **{"r": 3, **patterns},
            )
            run = lambda base=base: [base(row[None]) for b in batches() for row in b["input_ids"]]  # PEFT takes no more
            quiet(prepare, base, config, run_model=run if field is None or library is trimtab else None)
            found.append(numbers(quiet(library.get_peft_model, base, config)))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            near(other[name], value, 2e-3)


def gradients(base: nn.Module) -> Any:
    return lambda: [base(**b).loss.backward() for b in batches(2, labels=True)]


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga(direction: str) -> None:
    """The directions are PEFT's. The sizes are the paper's, where B has none of the gradient's: see differences."""
    from peft.tuners.lora.loraga import preprocess_loraga

    models = []
    for library, prepare in zip(BOTH, (trimtab.preprocess_loraga, preprocess_loraga), strict=True):
        base = llama()
        settings = library.LoraGAConfig(direction=direction, scale="unit")
        config = library.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=settings)
        prepare(base, config, gradients(base))
        models.append(numbers(quiet(library.get_peft_model, base, config)))
    ours, theirs = models
    for name, value in theirs.items():
        if "lora_" in name:
            axis = 1 if "lora_A" in name else 0
            mine, yours = (v / v.norm(dim=axis, keepdim=True) for v in (ours[name], value))
            near((mine * yours).sum(axis).abs(), torch.ones(2), 1e-3)
            near(ours[name].norm(dim=axis), torch.ones(2))


def test_lora_ga_comes_nearest_to_a_full_step() -> None:
    """Theorem 3.1 of the paper, which PEFT's start misses: no pair of this size is nearer to the gradient G."""
    from peft.tuners.lora.loraga import preprocess_loraga

    errors, x, y = [], torch.randn(64, 20), torch.randn(64, 24)
    for library, prepare in zip(BOTH, (trimtab.preprocess_loraga, preprocess_loraga), strict=True):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(20, 24))
        settings = library.LoraGAConfig(scale="unit")
        config = library.LoraConfig(r=3, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=settings)
        prepare(base, config, lambda base=base: (base(x) - y).square().mean().backward())
        G = base[0].__dict__["_peft_loraga_grad"]
        layer = quiet(library.get_peft_model, base, config).base_model.model[0]
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        step = B @ B.T @ G + G @ A.T @ A  # dW of a first step, up to its size
        c = (step * G).sum() / step.square().sum()
        errors.append(float((G - c * step).norm()))
        best = float(torch.linalg.svdvals(G)[6:].norm())
    assert errors[0] == pytest.approx(best, rel=1e-4)
    assert errors[1] > 1.2 * best


def test_what_starts_need() -> None:
    for library in BOTH:
        with pytest.raises(ValueError, match="`loftq_config` must be specified"):
            library.LoraConfig(init_lora_weights="loftq")
        with pytest.raises(ValueError, match="Only nf4 and int8 quantization is supported"):
            lora(library, "loftq", loftq_config=library.LoftQConfig(loftq_bits=2))
        with pytest.raises(ValueError, match="`eigens` attribute not found"):
            lora(library, "corda")
        for wrong in ({"rho": 0.5}, {"tau": 2}):
            with pytest.raises(ValueError, match=r"must be"):
                library.EvaConfig(**wrong)
    lora(peft, "lora_ga")  # silently a plain start
    with pytest.raises(ValueError, match="run `preprocess_loraga"):
        lora(trimtab, "lora_ga")


@pytest.mark.parametrize("kind", ["eva", "corda", "lora_ga", "loftq"])
def test_settings_go_through_files(kind: str, tmp_path: Path) -> None:
    import json

    field = f"{kind}_config"
    cls = {"eva": "EvaConfig", "corda": "CordaConfig", "lora_ga": "LoraGAConfig", "loftq": "LoftQConfig"}[kind]
    texts = []
    for library in BOTH:
        config = library.LoraConfig(init_lora_weights=kind, **{field: own(library, cls)()})
        config.save_pretrained(tmp_path / library.__name__)
        texts.append(json.loads((tmp_path / library.__name__ / "adapter_config.json").read_text())[field])
    assert texts[0] == texts[1]
    for library, other in zip(BOTH, reversed(BOTH), strict=True):
        read = quiet(library.PeftConfig.from_pretrained, tmp_path / other.__name__)
        assert type(getattr(read, field)).__name__ == ("dict" if kind == "loftq" else cls)
