"""accelerate: one process, and two over gloo with DDP and FSDP 2."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.as_peft import tiny


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def build() -> tuple[PeftModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    model = get_peft_model(tiny.llama(), config)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def alone(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What the two processes should find together: one plain loop over the whole batch."""
    model, optimizer = build()
    ids, losses = tiny.batch(8), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    from peft import get_peft_model_state_dict

    return losses, get_peft_model_state_dict(model)


def test_prepare_and_a_state_that_is_saved_and_loaded(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = build()
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tiny.batch(8)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch() -> list[float]:
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = epoch()
    accelerator.save_state(tmp_path)
    second = epoch()
    assert sum(second) < sum(first)
    accelerator.load_state(tmp_path)
    assert epoch() == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize("how", ["ddp", "full", "sharded"])
def test_two_processes_train_as_one_does_and_save_the_adapter_only(how, tmp_path):
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    script = Path(__file__).parent / "scripts" / "two_processes.py"
    environment = tiny.environment()
    environment["PYTHONPATH"] += f":{root}"
    done = subprocess.run(
        [*command, str(script), how, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt")
    losses, state = alone(5)
    assert result["losses"] + result["more"] == pytest.approx(losses, abs=1e-5)
    assert result["again"] == pytest.approx(
        result["more"], abs=1e-6
    )  # the state that came back is the one that was saved
    assert result["last"].keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(result["last"][key], value, atol=1e-5, rtol=1e-4)
    for folder in ("adapter", "gathered"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert saved.keys() == state.keys()
        for key, value in saved.items():
            torch.testing.assert_close(value, result["last"][key])
    if how == "full":
        names = torch.load(tmp_path / "state" / "pytorch_model_fsdp.bin", weights_only=True)
        assert names
        assert all("lora_" in n or "modules_to_save" in n for n in names)
