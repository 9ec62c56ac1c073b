"""Damaged adapter folders: finite outputs, or an error of ours that names the folder; the base is as it was."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.contract.cases import move
from tests.files import damage
from tests.models import assert_untouched, classifier, gpt2, logits, snapshot, tokens, toy
from trimtab import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from trimtab.errors import AdapterFileError, PeftError, PeftWarning
from trimtab.files.store import WEIGHTS

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "lora": (toy, lambda: LoraConfig(r=2, target_modules=["up", "head", "embed"])),
    "dora": (toy, lambda: LoraConfig(r=2, target_modules=["up", "down"], use_dora=True)),
    "loha": (toy, lambda: LoHaConfig(r=2, target_modules=["up", "conv"])),
    "ia3": (toy, lambda: IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])),
    "oft": (toy, lambda: OFTConfig(oft_block_size=2, target_modules=["up"])),
    "vera": (toy, lambda: VeraConfig(r=3, target_modules=["up"])),
    "adalora": (toy, lambda: AdaLoraConfig(target_modules=["up"], init_r=3, target_r=2, total_step=9)),
    "norms": (toy, lambda: LNTuningConfig(target_modules=["norm"])),
    "tokens": (gpt2, lambda: TrainableTokensConfig(token_indices=[1, 5])),
    "lora and tokens": (
        gpt2,
        lambda: LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[1, 7], bias="lora_only"),
    ),
    "head": (classifier, lambda: LoraConfig(task_type="SEQ_CLS", r=2)),
    "prompt": (gpt2, lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix": (gpt2, lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


def ids(case: str) -> Tensor:
    return tokens() if CASES[case][0] is toy else tokens(2, 5, 60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of every case, in both formats."""
    root = tmp_path_factory.mktemp("sound")
    for name, (base, config) in CASES.items():
        model = get_peft_model(base(), config()).eval()
        if name not in ("prompt", "prefix"):
            move(model, "default")
        for safe in (True, False):
            model.save_pretrained(root / name / str(safe), safe_serialization=safe)
    return root


def outcome(case: str, folder: Path) -> str:
    """What loading a damaged folder came to; anything but a finite output or an error of ours fails."""
    base = CASES[case][0]()
    before, expected = snapshot(base), logits(base, ids(case))
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (PeftError, NotImplementedError) as error:
        said = str(error)
        assert_untouched(base, before)
        assert all(p.requires_grad for p in base.parameters())
    else:
        assert logits(model.eval(), ids(case)).isfinite().all()
        model.unload()
        said = ""
    assert torch.equal(logits(base, ids(case)), expected)
    assert not said or str(folder) in said
    return "an error" if said else "an output"


def damaged(saved: Path, tmp_path: Path, seeds: range) -> None:
    seen: Counter[str] = Counter()
    for seed in seeds:
        case = list(CASES)[seed % len(CASES)]
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / case / str(random.Random(seed).random() < 0.7), folder)
        damage.damage(folder, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                seen[outcome(case, folder)] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}, case {case}")
                raise
    assert seen["an error"] > seen["an output"] > 0


def test_sound_folders_load(saved: Path) -> None:
    for case in CASES:
        for form in ("True", "False"):
            assert outcome(case, saved / case / form) == "an output"


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path, range(60))


@pytest.mark.slow
def test_many_damaged_folders(saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path, range(60, 2060))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "prompt"])
def test_every_field_with_every_odd_value(case: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved / case / "True", folder)
    sound = json.loads((folder / damage.CONFIG).read_text())
    for field in sound:
        for value in damage.ODD:
            (folder / damage.CONFIG).write_text(json.dumps({**sound, field: value}))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcome(case, folder)
                except BaseException as error:
                    error.add_note(f"{field}={value!r}")
                    raise


# ---------------------------------------------------------------------- numbers that no training makes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1e20])
@pytest.mark.parametrize("case", ["lora", "vera", "tokens", "head", "prompt"])
def test_numbers_that_are_none(case: str, value: float, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / case / "True", tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS
    values = load_file(path)
    key = sorted(values)[-1]
    values[key].view(-1)[-1] = value
    save_file(values, path, metadata={"format": "pt"})
    base = CASES[case][0]()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=f"is damaged: NaN, infinite or huge numbers are in .*{key}") as caught:
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert str(tmp_path) in str(caught.value)
    assert_untouched(base, before)
    with pytest.warns(PeftWarning, match="NaN, infinite or huge numbers"):
        PeftModel.from_pretrained(CASES[case][0](), tmp_path / "adapter", strict=False)


def test_a_copied_module_may_hold_a_mask(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head.register_buffer("mask", torch.full((4,), -torch.inf))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(x)) + 0 * self.head.mask.exp()  # type: ignore[operator]

    torch.manual_seed(0)
    base, again = Masked(), Masked()
    again.load_state_dict(base.state_dict())
    model = get_peft_model(base, LoraConfig(target_modules=["up"], modules_to_save=["head"])).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path)(torch.ones(1, 4)), model(torch.ones(1, 4)))
