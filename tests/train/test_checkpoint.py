"""A run that was stopped, killed or could not write goes on exactly, and what it has written is whole."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trimtab.errors import TrainError
from trimtab.methods import METHODS
from trimtab.train.checkpoint import checkpoints_in, write_folder
from trimtab.train.folder import read_run
from trimtab.train.loop import Event
from trimtab.train.report import console_for
from trimtab.train.run import Outcome, run_training

pytestmark = pytest.mark.usefixtures("no_pictures")
QUIET = console_for(quiet=True)
MAIN = "import torch; torch.set_num_threads(1); from trimtab.cli import main; main()"


@pytest.fixture
def settings(base_folder, sums):
    """A short run with dropout: 8 steps of 2 x 2 rows, a checkpoint at 3 and 6, scored at 4 and 8."""
    return {
        "model": str(base_folder), "data": str(sums / "train.jsonl"), "eval_data": str(sums / "valid.jsonl"),
        "precision": "fp32", "lora_dropout": 0.3, "max_steps": 8, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "save_steps": 3, "eval_steps": 4, "learning_rate": 5e-3,
    }  # fmt: skip


def run(settings: dict, output: Path, *events, **changes) -> Outcome:
    config, _ = read_run({**settings, "output": str(output), **changes})
    return run_training(config, QUIET, events=events)


class StopAt(Event):
    """Presses Ctrl-C, or dies, at a step."""

    def __init__(self, at: int, how: str = "ctrl-c") -> None:
        self.at, self.how = at, how

    def before(self, run) -> None:
        if run.step + 1 == self.at and self.how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)

    def step(self, run) -> None:
        if run.step == self.at and self.how == "dies":
            raise KeyError("died")


def same_files(a: Path, b: Path) -> None:
    """The adapters are equal to the bit, and the metrics but for their times."""
    first, second = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    lines = [[{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
              for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (a, b)]  # fmt: skip
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("how", "at"), [("ctrl-c", 5), ("ctrl-c", 4), ("dies", 7), ("dies", 2)])
def test_a_resumed_run_equals_one_without_a_break(how, at, settings, tmp_path) -> None:
    whole = run(settings, tmp_path / "whole")
    if how == "ctrl-c":
        broken = run(settings, tmp_path / "broken", StopAt(at))
        assert broken.interrupted
        assert broken.adapter is None
        assert checkpoints_in(tmp_path / "broken")[-1].name == f"checkpoint-{at}"
    else:  # the last checkpoint is an earlier one, or there is none; the metrics go further
        with pytest.raises(KeyError, match="died"):
            run(settings, tmp_path / "broken", StopAt(at, how))
    torch.manual_seed(123)  # the state of this process must not matter
    resumed = run({}, tmp_path / "broken", resume=True)  # run.yaml has the rest
    assert resumed.result.losses == whole.result.losses
    assert resumed.result.scores == whole.result.scores
    assert resumed.result.tokens == whole.result.tokens
    same_files(tmp_path / "whole", tmp_path / "broken")


# What the tiny model needs of methods whose usual sizes are for larger ones.
SMALL: dict[str, dict] = {
    "TRAINABLE_TOKENS": {"token_indices": [16, 17, 18]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "BITFIT": {"modules_to_save": ["norm"]},  # there is no bias
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 9},
    "WAVEFT": {"n_frequency": 9},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 4},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "PSOFT": {"r": 4},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
}


# AdaLoRA has a test of its own; rows say no task, and a router works among adapters that are there.
OTHERS = ("ADALORA", "MULTITASK_PROMPT_TUNING", "XLORA")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in OTHERS])
def test_every_method_resumes_exactly(method, settings, tmp_path) -> None:
    own = SMALL.get(method, {})
    short = {k: v for k, v in settings.items() if k != "lora_dropout"} | {"method": method, "max_steps": 4, **own}
    whole = run(short, tmp_path / "whole")
    run(short, tmp_path / "broken", StopAt(2))
    assert run({}, tmp_path / "broken", resume=True).result.losses == whole.result.losses
    same_files(tmp_path / "whole", tmp_path / "broken")


# What a run has beside the numbers of its file: networks, draws, counts, averages, clusters that are left.
BESIDE: dict[str, dict] = {
    "lstm": {"method": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.3},
    "projection": {"method": "PREFIX_TUNING", "prefix_projection": True},
    "examples": {"method": "CPT", "cpt_token_ids": [40, 41, 42, 43], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "draws": {"method": "PVERA", "r": 4, "sample_at_inference": True, "generator_seed": 3},
    "sampled": {"monteclora_config": {"num_samples": 3}},
    "direction": {"velora_config": {"num_groups": 4}},
    "clusters": {
        "method": "ADAMSS", "r": 8, "use_asa": True, "asa_target_subspaces": 5, "init_warmup": 1, "final_warmup": 4,
        "mask_interval": 1,
    },
    "biases": {"bias": "all", "use_dora": True},
    "modules": {"modules_to_save": ["lm_head"], "trainable_token_indices": [16, 17]},
    "tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}  # fmt: skip


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("case", BESIDE)
def test_what_an_adapters_file_lacks_is_in_the_checkpoint(case, at, settings, tmp_path) -> None:
    """Also where checkpoints are written in between: writing one changes nothing; and after the last step."""
    plain = {k: v for k, v in settings.items() if k != "lora_dropout"}
    short = plain | {"max_steps": 4, "save_steps": 1, "eval_steps": 1} | BESIDE[case]
    whole = run(short, tmp_path / "whole")
    run({**short, "save_steps": -1}, tmp_path / "broken", StopAt(at))
    resumed = run({}, tmp_path / "broken", resume=True)
    assert resumed.result.losses == whole.result.losses
    assert resumed.result.scores == whole.result.scores
    same_files(tmp_path / "whole", tmp_path / "broken")


PRUNED = {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "lora_dropout": 0}


@pytest.mark.parametrize(("how", "at"), [("ctrl-c", 5), ("dies", 5), ("ctrl-c", 8)])
def test_ranks_that_were_cut_before_the_break_stay_cut(how, at, settings, tmp_path) -> None:
    pruned = {**settings, **PRUNED}
    whole = run(pruned, tmp_path / "whole")
    if how == "ctrl-c":
        run(pruned, tmp_path / "broken", StopAt(at))
    else:
        with pytest.raises(KeyError, match="died"):
            run(pruned, tmp_path / "broken", StopAt(at, how))
    if at == 8:  # after the last cut
        left = json.loads((tmp_path / "broken" / "checkpoint-8" / "adapter_config.json").read_text())["rank_pattern"]
        assert not all(all(kept) for kept in left.values())
    assert run({}, tmp_path / "broken", resume=True).result.losses == whole.result.losses
    same_files(tmp_path / "whole", tmp_path / "broken")
    configs = [json.loads((tmp_path / n / "adapter" / "adapter_config.json").read_text()) for n in ("whole", "broken")]
    assert configs[0] == configs[1]


def test_the_best_checkpoint_has_the_ranks_it_had(settings, tmp_path) -> None:
    more = {"save_steps": 1, "eval_steps": 1, "save_total_limit": 1, "load_best": True, "learning_rate": 1.0}
    for seed in range(8):  # whether it gets worse again before the end hangs on the kernels' rounding
        folder = tmp_path / f"run-{seed}"
        best, _ = run({**settings, **PRUNED, **more, "seed": seed}, folder).result.best
        if best < 7:
            break
    assert best < 7
    folders = [folder / name for name in (f"checkpoint-{best}", "adapter")]
    kept, final = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in final.items()}
    assert all(torch.equal(final[key], value) for key, value in kept.items())
    ranks = [json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] for folder in folders]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("optimizer", ["loraplus", "lorafa", "riemannian"])
def test_every_optimiser_resumes_exactly(optimizer, settings, tmp_path) -> None:
    short = {**settings, "max_steps": 4, "optimizer": optimizer, "lr_scheduler_type": "cosine"}
    whole = run(short, tmp_path / "whole")
    run(short, tmp_path / "broken", StopAt(2))
    assert run({}, tmp_path / "broken", resume=True).result.losses == whole.result.losses
    same_files(tmp_path / "whole", tmp_path / "broken")


def command(settings: dict, *more: str) -> list[str]:
    flags = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, "-c", MAIN, "train", *flags, *more]


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_end(settings, tmp_path) -> None:
    longer = {**settings, "max_steps": 60, "save_steps": 4, "eval_steps": 25}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(longer, "--output", str(whole)), check=True, capture_output=True)
    at = random.randrange(6, 50)
    with subprocess.Popen(
        command(longer, "--output", str(broken)), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        metrics = broken / "metrics.jsonl"
        while child.poll() is None and not (metrics.exists() and f'"step": {at},' in metrics.read_text()):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL, f"it had ended before step {at}"
    assert not (broken / "adapter").exists()
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "train", "--resume", "--output", str(broken)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Going on after step" in done.stdout
    same_files(whole, broken)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(settings, tmp_path) -> None:
    """The system itself refuses to write more than so many bytes into a file, from step 4 on."""
    code = f"""
import resource, sys
from trimtab.train.loop import Event
from trimtab.train.folder import read_run
from trimtab.train.run import run_training

class Full(Event):
    def before(self, run):
        if run.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

config, _ = read_run({{**{settings!r}, "output": {str(tmp_path / "run")!r}}})
run_training(config, events=[Full()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "checkpoint-6 could not be written" in last
    assert "File too large" in last
    assert "checkpoint-3 is as it was; go on from it with --resume" in last
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-3", "metrics.jsonl", "run.yaml"]
    whole = run(settings, tmp_path / "whole")
    resumed = run({}, tmp_path / "run", resume=True)
    assert resumed.result.losses == whole.result.losses


def test_a_disk_that_is_full_at_the_end_costs_nothing_but_the_last_write(settings, tmp_path) -> None:
    """As above, in this process, after the last checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(Event):
        def end(self, run) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(TrainError, match=r"adapter could not be written: .*checkpoint-6 is as it was"):
            run(settings, tmp_path / "run", Full())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-3", "checkpoint-6", "metrics.jsonl",
                                                                    "run.yaml"]  # fmt: skip
    assert run({}, tmp_path / "run", resume=True).adapter.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "thing"
    write_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fails(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        write_folder(target, fails)
    assert (target / "a").read_text() == "1"
    write_folder(target, lambda folder: (folder / "b").write_text("3"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_old_checkpoints_go_and_the_best_stays(settings, tmp_path) -> None:
    settings |= {"save_steps": 1, "eval_steps": 1, "save_total_limit": 2, "load_best": True, "learning_rate": 0.3}
    outcome = run(settings, tmp_path / "run", lora_dropout=0)
    best, _ = outcome.result.best
    assert best < 7, "a learning rate at which it gets worse again"
    names = {p.name for p in checkpoints_in(tmp_path / "run")}
    assert names == {f"checkpoint-{best}", "checkpoint-7", "checkpoint-8"}
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[key], value) for key, value in kept.items())
    assert json.loads((tmp_path / "run" / "adapter" / "trimtab.json").read_text())["kept_step"] == best


def test_a_checkpoint_is_an_adapter_like_any_other(settings, tmp_path) -> None:
    from trimtab import AutoPeftModelForCausalLM

    run(settings, tmp_path / "run")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert model.active_peft_config.r == 16


def test_what_belongs_to_another_run_is_refused(settings, tmp_path, sums) -> None:
    run(settings, tmp_path / "run", StopAt(5))
    with pytest.raises(TrainError, match=r"holds another run \(up to checkpoint-5\).*--resume.*--overwrite-output-dir"):
        run(settings, tmp_path / "run")
    with pytest.raises(TrainError, match=r"another run.*learning_rate \(0.005 then, 0.1 now\), rows "):
        run({}, tmp_path / "run", resume=True, learning_rate=0.1, data=str(sums / "valid.jsonl"))
    run({}, tmp_path / "run", resume=True, eval_steps=2, save_steps=5, report_to=[])  # what may change
    with pytest.raises(TrainError, match="finished"):
        run(settings, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    outcome = run(settings, tmp_path / "run", overwrite_output_dir=True, max_steps=2)
    assert outcome.result.step == 2
    assert not checkpoints_in(tmp_path / "run") or checkpoints_in(tmp_path / "run")[-1].name == "checkpoint-2"
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_one_message(settings, tmp_path) -> None:
    run(settings, tmp_path / "run", StopAt(5))
    (tmp_path / "run" / "checkpoint-5" / "trainer_state.pt").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(TrainError, match=r"trainer_state\.pt cannot be read"):
        run({}, tmp_path / "run", resume=True)


def test_resume_without_a_run_starts_one(settings, tmp_path) -> None:
    assert run(settings, tmp_path / "run", resume=True, max_steps=1).result.step == 1
