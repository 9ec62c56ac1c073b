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

from trimtab.errors import ConfigError, PeftError, TrainError
from trimtab.train.config import TrainConfig
from trimtab.train.events import Interrupt
from trimtab.train.jobs import read_jobs, run_jobs
from trimtab.train.loop import Event
from trimtab.train.run import run_training

pytestmark = pytest.mark.usefixtures("no_pictures")
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


class StopAfter(Event):
    """Ends every job after so many of its steps from here, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps, self.first = steps, {}

    def begin(self, run) -> None:
        self.first[run.adapter] = run.step

    def step(self, run) -> None:
        if run.step == self.first[run.adapter] + self.steps and not run.last:
            run.stop = Interrupt.REASON


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
            torch.testing.assert_close(value, wanted[key], rtol=1e-2, atol=2e-4, msg=f"{name} {key}")
        for a, b in zip(lines(folder), lines(alone), strict=True):
            assert a.keys() == b.keys()
            for key in ("loss", "learning_rate", "eval_loss", "epoch"):
                assert a.get(key) == pytest.approx(b.get(key), rel=1e-4) if key in a else True
        configs = [yaml.safe_load((f / "run.yaml").read_text()) for f in (folder, alone)]
        assert configs[0].pop("output") != configs[1].pop("output")
        assert configs[0] == configs[1]
        facts = [json.loads((f / "adapter" / "trimtab.json").read_text()) for f in (folder, alone)]
        assert facts[0]["base_model"] == facts[1]["base_model"]


def test_jobs_stop_together_and_go_on_where_each_was(tmp_path, common) -> None:
    whole, parts = ({**common, "output": str(tmp_path / n), "jobs": OWN, "tokens": 200} for n in ("whole", "parts"))
    run_jobs(read_jobs(write(tmp_path / "whole.yaml", whole)))
    path = write(tmp_path / "parts.yaml", parts)
    first = run_jobs(read_jobs(path), events=[StopAfter(3)])
    assert [(o.result.step, o.interrupted, o.adapter) for o in first.values()] == [(3, True, None)] * 3
    with pytest.raises(TrainError, match=r"job 'one': .* holds another run"):
        run_jobs(read_jobs(path))
    second = run_jobs(read_jobs(path, {"resume": True}), events=[StopAfter(2)])
    assert [(o.result.step, o.interrupted) for o in second.values()] == [(5, True), (5, False), (5, True)]
    third = run_jobs(read_jobs(path, {"resume": True}))
    assert list(third) == ["one", "three"]  # two is finished
    assert run_jobs(read_jobs(path, {"resume": True})) == {}
    for name in OWN:
        found, wanted = weights(tmp_path / "parts" / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert [m["step"] for m in lines(tmp_path / "parts" / name)] == [
            m["step"] for m in lines(tmp_path / "whole" / name)
        ]


def test_jobs_go_on_with_what_their_files_lack(tmp_path, common) -> None:
    clusters = {"use_asa": True, "asa_target_subspaces": 5, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    own = {
        "draws": {"method": "pvera", "r": 4, "sample_at_inference": True, "generator_seed": 3},
        "clusters": {"method": "adamss", "r": 8, **clusters},
    }
    settings = {**common, "max_steps": 4, "eval_steps": 1, "jobs": own}
    paths = [write(tmp_path / f"{n}.yaml", {**settings, "output": str(tmp_path / n)}) for n in ("whole", "parts")]
    run_jobs(read_jobs(paths[0]))
    run_jobs(read_jobs(paths[1]), events=[StopAfter(2)])
    run_jobs(read_jobs(paths[1], {"resume": True}))
    for name in own:
        found, wanted = weights(tmp_path / "parts" / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        parts, whole = ([{**m, "tokens_per_second": 0} for m in lines(tmp_path / n / name)] for n in ("parts", "whole"))
        assert parts == whole


def test_one_that_diverges_is_said_and_leaves_the_others_alone(tmp_path, common) -> None:
    own = {**OWN, "mad": {"learning_rate": 1e30, "lr_scheduler_type": "constant"}}
    path = write(tmp_path / "jobs.yaml", {**common, "output": str(tmp_path / "out"), "jobs": own})
    outcomes = run_jobs(read_jobs(path))
    assert outcomes["mad"].result.failed
    assert outcomes["mad"].adapter is None
    assert "learning rate" in outcomes["mad"].result.stopped
    run_jobs(read_jobs(write(tmp_path / "b.yaml", {**common, "output": str(tmp_path / "b"), "jobs": OWN})))
    for name in OWN:
        assert not outcomes[name].result.stopped
        found, wanted = weights(tmp_path / "out" / name), weights(tmp_path / "b" / name)
        assert all(torch.allclose(found[key], wanted[key], rtol=1e-2, atol=2e-4) for key in wanted)


def test_a_job_that_stops_early_keeps_its_best(tmp_path, common) -> None:
    own = {
        "wild": {"learning_rate": 0.5, "early_stopping_patience": 1, "eval_steps": 1, "num_train_epochs": 9},
        "calm": {},
    }
    path = write(tmp_path / "jobs.yaml", {**common, "output": str(tmp_path / "out"), "jobs": own})
    outcomes = run_jobs(read_jobs(path))
    wild, calm = outcomes["wild"].result, outcomes["calm"].result
    assert "no better" in wild.stopped
    assert calm.step == 6
    assert not calm.stopped
    facts = json.loads((tmp_path / "out" / "wild" / "adapter" / "trimtab.json").read_text())
    assert facts["kept_step"] == wild.best[0] if wild.best else wild.step


def test_jobs_are_read_as_a_list_too_and_go_on_from_adapters(tmp_path, common) -> None:
    path = write(tmp_path / "jobs.yaml", {**common, "output": str(tmp_path / "out"), "jobs": {"first": {"r": 2}}})
    run_jobs(read_jobs(path))
    more = {
        **common,
        "jobs": [{"name": "again", "continue_from": str(tmp_path / "out/first/adapter")}, {"name": "new"}],
    }
    jobs = read_jobs(write(tmp_path / "more.yaml", more), {"output": str(tmp_path / "more"), "max_steps": 2})
    outcomes = run_jobs(jobs)
    assert outcomes["again"].result.losses[0][1] < outcomes["new"].result.losses[0][1]
    assert outcomes["again"].model.peft_config["again"].r == 2
    assert outcomes["new"].result.step == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "needs `jobs:`, a mapping"),
        ({"jobs": {}}, "there are no jobs"),
        ({"jobs": [{"r": 2}]}, "with a `name`"),
        (
            {"jobs": {"a": {"learning_rat": 1}, "b": {}}},
            "job 'a': learning_rat is no setting .*did you mean learning_rate",
        ),
        ({"learning_rat": 1, "jobs": {"a": {}, "b": {}}}, "common settings: learning_rat is no .*mean learning_rate"),
        ({"jobs": {"a": {"model": "x"}, "b": {"bf16": True}}}, "job 'a': model can only be .*; job 'b': precision can"),
        ({"jobs": {"a/b": {}}}, "job 'a/b': a name has letters"),
        ({"jobs": {"a": 3}}, "job 'a' must be a mapping"),
        ({"jobs": {"a": {"r": "x"}, "b": {}}}, "job 'a': r: expected a whole number"),
        ({"jobs": {"a": {}}, "tokens": 0}, "tokens, of a shared pass"),
        ({"jobs": {"a": {}}, "trainer": "trl"}, "trainer is for one run by itself"),
        ({"data": None, "jobs": {"a": {}, "b": {"data": "x"}}}, "job 'a': Name the rows to learn"),
    ],
)
def test_what_cannot_be_is_said_with_the_job_it_is_of(tmp_path, common, content, message) -> None:
    own = {k: v for k, v in {**common, **content}.items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        read_jobs(write(tmp_path / "jobs.yaml", own))


def test_faults_of_rows_and_adapters_name_the_job(tmp_path, common) -> None:
    for settings, message in (
        ({"data": str(tmp_path / "none.jsonl")}, "job 'bad': .*none.jsonl"),
        ({"target_modules": "qq_proj"}, "job 'bad': .*qq_proj"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 2}, "'bad' is a prompt"),
        ({"optimizer": "lorafa"}, "job 'bad': optimizer lorafa"),
    ):
        jobs = {**common, "output": str(tmp_path / "out"), "jobs": {"good": {}, "bad": settings}}
        with pytest.raises(PeftError, match=message):
            run_jobs(read_jobs(write(tmp_path / "jobs.yaml", jobs)))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_jobs_go_on_to_the_same_end(tmp_path, common) -> None:
    main = "from trimtab.cli import main; main()"
    paths = [write(tmp_path / f"{n}.yaml", {**common, "jobs": OWN, "output": str(tmp_path / n)}) for n in ("a", "b")]
    run_jobs(read_jobs(paths[0]))
    command = [sys.executable, "-c", main, "train", "--jobs", str(paths[1])]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        while not all((tmp_path / "b" / name / "checkpoint-2").exists() for name in OWN):
            assert child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in OWN:
        found, wanted = weights(tmp_path / "b" / name), weights(tmp_path / "a" / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
