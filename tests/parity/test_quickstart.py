"""The quick-start scripts, unmodified, with trimtab and with the real peft: the same losses from the same start."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
SCRIPTS = ["trainer_lora", "trl_sft", "accelerate_loop"]
STEPS = 8


def scripts(*often: str) -> pytest.MarkDecorator:
    """All scripts; those that are not named run in `make test-all` alone."""
    return pytest.mark.parametrize(
        "script", [pytest.param(s, marks=[] if s in often else pytest.mark.slow) for s in SCRIPTS]
    )


def run(script: str, output: Path, *arguments: str, alias: bool, oracle: bool = True) -> list[float]:
    """Run a script and return its losses."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = str(Path(importlib.util.find_spec("peft").origin).parents[1]) if oracle else ""
    command = [sys.executable, *(["-m", "trimtab.as_peft"] if alias else []), str(FOLDER / f"{script}.py")]
    command += ["--output", str(output), "--steps", str(STEPS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    if script == "accelerate_loop":
        return json.loads((output / "losses.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[str, str]:
    """A tiny model's folder, and that of an adapter which the real peft made."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("start")
    spec = importlib.util.spec_from_file_location("tiny_of_quickstart", FOLDER / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    model = tiny.make(str(folder / "model"))
    torch.manual_seed(5)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(folder / "adapter")
    return model, str(folder / "adapter")


@scripts("trl_sft", "accelerate_loop")
def test_the_same_losses_as_with_the_real_peft(script, start, tmp_path):
    model, adapter = start
    arguments = ("--model", model, "--adapter", adapter)
    theirs = run(script, tmp_path / "theirs", *arguments, alias=False)
    ours = run(script, tmp_path / "ours", *arguments, alias=True)
    print(f"{script}: largest difference of {STEPS} losses {max(abs(a - b) for a, b in zip(ours, theirs)):.1e}")
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-5)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).stat().st_size > 0
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4


@scripts("trainer_lora")
def test_it_runs_from_nothing_without_the_real_peft(script, tmp_path):
    losses = run(script, tmp_path / "out", alias=True, oracle=False)
    assert losses[-1] < losses[0]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
