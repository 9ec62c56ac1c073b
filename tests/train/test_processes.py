"""Two real processes over gloo do what one does on the whole step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trimtab.train.batches import Batch
from trimtab.train.folder import read_run
from trimtab.train.processes import Alone
from trimtab.train.report import console_for
from trimtab.train.run import run_training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(base_folder, tmp_path):
    """Steps of 2 x 2 rows, of 25: the last step of an epoch has one batch, for two processes."""
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(25)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": str(base_folder), "data": str(tmp_path / "rows.jsonl"), "eval_data": str(tmp_path / "rows.jsonl"),
        "precision": "fp32", "num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "lora_alpha": 16, "eval_steps": -1,
    }  # fmt: skip


def launch(*command: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *command]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def same(a: Path, b: Path, tolerance: float) -> None:
    first, second = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (a, b))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=tolerance)


def alone(settings: dict, output: Path) -> list[tuple[int, float]]:
    config, _ = read_run({**settings, "output": str(output), "gradient_accumulation_steps": 2})
    return run_training(config, console_for(quiet=True)).result.losses


@pytest.mark.slow
def test_data_parallel_equals_one_process_on_the_same_rows(settings, tmp_path) -> None:
    flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    launch("-m", "trimtab", "train", *flags, "--output", str(tmp_path / "two"))
    losses = alone(settings, tmp_path / "one")
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [m["loss"] for m in lines if "loss" in m] == pytest.approx([loss for _, loss in losses], rel=1e-6)
    assert [m["step"] for m in lines if "loss" in m] == [step for step, _ in losses], "each step is written once"
    same(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_fully_sharded_trains_saves_and_resumes(settings, tmp_path) -> None:
    launch(str(Path(__file__).parent / "scripts" / "two_processes.py"), str(tmp_path), json.dumps(settings))
    losses = json.loads((tmp_path / "losses.json").read_text())
    expected = alone(settings, tmp_path / "one")
    assert [loss for _, loss in losses["whole"]] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    assert [loss for _, loss in losses["again"]] == pytest.approx([loss for _, loss in losses["whole"]], abs=1e-6)
    same(tmp_path / "one", tmp_path / "whole", 1e-4)
    same(tmp_path / "whole", tmp_path / "broken", 1e-5)


def test_every_process_has_as_many_batches_and_every_batch_counts_once() -> None:
    batches = [Batch((i,), 1, 1, 1) for i in range(5)]
    groups = []
    for rank in range(3):
        group = Alone()
        group.count, group.rank = 3, rank
        groups.append(group.share(batches))
    assert [len(g) for g in groups] == [2, 2, 2]
    assert sorted(b.rows[0] for g in groups for b, counts in g if counts) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_many_adapters_at_once_are_refused_in_each_of_two_processes() -> None:
    launch(str(ROOT / "tests" / "train" / "scripts" / "many_refused.py"))
