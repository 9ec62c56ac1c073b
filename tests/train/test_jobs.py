"""`trimtab train --jobs`: every job's folder holds what a run by itself would have left there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from trimtab.errors import ConfigError, TrainError
from trimtab.train.config import TrainConfig
from trimtab.train.jobs import read_jobs, run_jobs
from trimtab.train.run import run_training

OWN: dict[str, dict[str, Any]] = {
    "one": {"r": 2, "learning_rate": 1e-2, "seed": 3, "lora_dropout": 0.2},
    "two": {"method": "dora", "r": 4, "target_modules": "q_proj,v_proj", "max_steps": 5},
    "three": {"per_device_train_batch_size": 5, "lr_scheduler_type": "cosine", "optimizer": "loraplus"},
}


@pytest.fixture
def common(base_folder, sums) -> dict[str, Any]:
    return {
        "model": str(base_folder), "data": str(sums / "train.jsonl"), "eval_data": str(sums / "valid.jsonl"),
        "num_train_epochs": 2, "precision": "fp32", "learning_rate": 3e-3, "save_steps": 2,
    }  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_job_leaves_what_a_run_by_itself_leaves(tmp_path, common) -> None:
    path = write(tmp_path / "jobs.yaml", {**common, "output": str(tmp_path / "out"), "tokens": 200, "jobs": OWN})
    outcomes = run_jobs(read_jobs(path))
    assert list(outcomes) == list(OWN)
    for name, own in OWN.items():
        folder, alone = tmp_path / "out" / name, tmp_path / "alone" / name
        run_training(TrainConfig(**{**common, **own, "output": str(alone)}))
        assert outcomes[name].adapter == folder / "adapter"
        assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
        assert {p.name for p in (folder / "adapter").iterdir()} == {p.name for p in (alone / "adapter").iterdir()}
        found, wanted = weights(folder), weights(alone)
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-2, atol=2e-4, msg=lambda m, k=key: f"{name} {k}: {m}")
        for a, b in zip(lines(folder), lines(alone), strict=True):
            assert a.keys() == b.keys()
            for key in ("loss", "learning_rate", "eval_loss", "epoch"):
                assert a.get(key) == pytest.approx(b.get(key), rel=1e-4) if key in a else True
        configs = [yaml.safe_load((f / "run.yaml").read_text()) for f in (folder, alone)]
        assert configs[0].pop("output") != configs[1].pop("output")
        assert configs[0] == configs[1]
        facts = [json.loads((f / "adapter" / "trimtab.json").read_text()) for f in (folder, alone)]
        assert facts[0]["base_model"] == facts[1]["base_model"]
