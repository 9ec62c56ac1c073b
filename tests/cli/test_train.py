"""`trimtab train`: flags and files mirror each other, errors are one message, and it ends with the right code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.train.conftest import make_model, make_tokenizer
from trimtab.cli import app
from trimtab.cli.options import rest
from trimtab.train.config import FIELDS, SHOWN

MAIN = [
    sys.executable,
    "-c",
    "import sys, torch; torch.set_num_threads(1); sys.argv[0] = 'trimtab'; from trimtab.cli import main; main()",
]
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}


def trimtab(*args: object) -> Result:
    """In this process: importing torch takes longer than the run."""
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A tiny base, rows, and a place for runs."""
    folder = tmp_path_factory.mktemp("there")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_help_shows_every_setting() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    for name in (*FIELDS, *SHOWN):
        assert f"--{name.replace('_', '-')} " in result.output, name


def test_words_that_are_no_field_of_a_run() -> None:
    assert rest(["--lora-rank", "8", "run.yml", "--use_dora", "--x=1", "--no-packing", "--alpha", "-1"]) == (
        {"lora_rank": "8", "use_dora": "true", "x": "1", "packing": "false", "alpha": "-1"},
        ["run.yml"],
    )


def test_a_file_and_flags_over_it(there) -> None:
    config = there / "run.yml"
    config.write_text(f"model: {there / 'base'}\ndata: {there / 'rows.jsonl'}\nlora_r: 2\nmax_steps: 9\n")
    out = there / "a"
    more = ["--max-steps", 2, "--target-modules", "q_proj,v_proj", "--use-rslora"]
    done = trimtab("train", config, "--output", out, *more)
    assert done.exit_code == 0, done.output
    assert "lora_r is read as r." in done.stderr
    assert "Training  step 2/2  loss" in done.stderr
    assert "LORA, r 2, alpha 4, effective scale 2.82843, on 4 modules" in done.stdout
    assert "learning rate 0.001 (by the model's width), linear" in done.stdout
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["use_rslora"], sorted(saved["target_modules"])) == (2, True, ["q_proj", "v_proj"])
    again = trimtab("train", "--config", out / "run.yaml", "--output", there / "b")
    assert again.exit_code == 0, again.output
    weights = [(there / x / "adapter" / "adapter_model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]
    done = trimtab("train", config, "--output", out)
    assert done.exit_code == 1
    assert "holds another run (finished)" in str(done.exception)


def test_rows_alone_are_enough_to_be_understood(there) -> None:
    done = trimtab("train", there / "rows.jsonl", "--model", there / "base", "--plan", "--output", there / "plan")
    assert done.exit_code == 0, done.output
    assert "24 of" in done.stdout
    assert "Nothing was trained or written" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learnin-rate", "1"], "learnin_rate is no setting of a run"),
        (["--learning-rate", "fast"], "learning_rate: expected a number, not 'fast'"),
        (["a.yaml", "b.yaml"], "There are two config files, a.yaml and b.yaml"),
        (["a.csv", "--data", "b.csv"], "There are two files of rows"),
        (["no.yaml"], "no.yaml cannot be read"),
        ([], "Name the rows to learn"),
    ],
)
def test_what_cannot_be_is_one_message_and_code_2(args, message) -> None:
    result = CliRunner().invoke(app, ["train", *args])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c(presses, there) -> None:
    out = there / f"ctrl-c-{presses}"
    args = ["train", there / "rows.jsonl", "--model", there / "base", "--output", out, "--max-steps", "100000"]
    with subprocess.Popen([*MAIN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=ENVIRONMENT) as child:  # fmt: skip
        metrics = out / "metrics.jsonl"
        while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        if presses == 2:
            time.sleep(0.001)
            child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=100)
    assert child.returncode == 130
    assert "Traceback" not in errors
    if presses == 1:
        assert "Stopping after this step" in errors
        assert f"Go on: trimtab train --resume --output {out}" in said.replace("\n", " ").replace("  ", " ")
        assert list(out.glob("checkpoint-*/trainer_state.pt"))
    assert not (out / "adapter").exists()
    assert not list(out.glob(".*")), "nothing half written is left"


@pytest.mark.slow
def test_trl_trains_on_the_same_rows_in_a_process_of_its_own(there) -> None:
    out = there / "trl"
    args = ["train", there / "rows.jsonl", "--model", there / "base", "--output", out, "--trainer", "trl"]
    args += ["--max-steps", "2", "--precision", "fp32", "--r", "4"]
    done = subprocess.run([*MAIN, *map(str, args)], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "trainer  SFTTrainer" in done.stdout
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    done = subprocess.run([*MAIN, *map(str, args)], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("trimtab: ")
    assert "holds another run" in done.stderr


@pytest.mark.parametrize("verb", ["dpo", "kto", "reward", "grpo"])
def test_without_trl_a_line_says_so(verb, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = trimtab(verb, "--data", "x.jsonl")
    assert done.exit_code == 1
    assert done.stderr == f"trimtab {verb}: this is done by TRL, which is not installed: pip install trl\n"


def test_jobs_print_what_they_share_and_end_with_the_right_code(there) -> None:
    jobs = there / "jobs.yaml"
    jobs.write_text(
        f"model: {there / 'base'}\ndata: {there / 'rows.jsonl'}\nmax_steps: 2\nprecision: fp32\njobs:\n"
        "  small: {r: 2}\n  large: {r: 8, learning_rate: 0.01}\n"
    )
    done = trimtab("train", "--jobs", jobs, "--output", there / "both", "--tokens", "500")
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("one for all 2 jobs", "up to 500 tokens", "small", "large", "0.01"))
    for name in ("small", "large"):
        assert f"{there / 'both' / name}"[:20] in done.stdout
        assert (there / "both" / name / "adapter" / "adapter_model.safetensors").is_file()
    again = trimtab("train", "--jobs", jobs, "--output", there / "both", "--resume")
    assert "All 2 jobs" in again.stdout
    mad = trimtab("train", "--jobs", jobs, "--output", there / "mad", "--learning-rate", "1e30", "--max-grad-norm", "0")
    assert mad.exit_code == 1  # "small" diverges, "large" has a rate of its own
    assert not (there / "mad" / "small" / "adapter").exists()
    assert (there / "mad" / "large" / "adapter").exists()
    typo = trimtab("train", "--jobs", jobs, "--output", there / "typo", "--ranc", "4")
    assert typo.exit_code == 2
