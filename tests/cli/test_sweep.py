"""`trimtab rank sweep` and `trimtab train --rank auto`, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.cli.test_cli import tiny_base  # noqa: F401  a fixture
from trimtab.cli import app
from trimtab.errors import PeftError

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ["--precision", "fp32", "--max-steps", "6"]


def run(*args: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, args)], env={"COLUMNS": "200"})
    if isinstance(done.exception, PeftError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def test_a_sweep(tiny_base: Path) -> None:  # noqa: F811
    data, out = tiny_base / "data", tiny_base / "out"
    args = ["rank", "sweep", "--model", tiny_base / "base", "--data", data / "train.jsonl", "--ranks", "1,2", *SMALL]
    args += ["--eval-data", data / "valid.jsonl", "--rates", "1e-3,1e-2,0.1", "--output", out]
    said = run(*args, "--plan").stdout
    assert "34 steps in all, where every rate and seed to its end would be 72" in said
    assert "Nothing was trained or written" in said
    assert not out.exists()
    said = run(*args).stdout
    assert "Take r=" in said
    assert "no rank is given up" in said
    assert {p.name for p in out.iterdir()} >= {"sweep.json", "table.md", "sweep.png", "adapter", "runs"}
    again = run(*args, "--json").stdout
    content = json.loads(again)
    assert content["done"] == 0
    assert content["repeated"] > 0
    assert content["advice"][:40] in said
    assert json.loads((out / "sweep.json").read_text())["advice"] == content["advice"]


def test_options_of_train_and_a_file_of_them(tiny_base: Path) -> None:  # noqa: F811
    data = tiny_base / "data"
    (tiny_base / "run.yaml").write_text(f"model: {tiny_base / 'base'}\nmax_steps: 2\nprecision: fp32\n")
    args = ["rank", "sweep", tiny_base / "run.yaml", data / "train.jsonl", "--ranks", "1", "--rates", "1e-3"]
    args += ["--val-size", "4", "--seeds", "1", "--targets", "q_proj,v_proj", "--general", data / "valid.jsonl"]
    content = json.loads(run(*args, "--output", tiny_base / "o", "--json").stdout)
    assert (content["rows"], content["held_out"], content["steps"]) == (12, 4, 2)
    assert content["take"]["target_modules"] == "q_proj,v_proj"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ranks", "1,x"], "--ranks: 1,x is not a list of numbers"),
        (["--ranks", "0"], "0 is not a rank"),
        (["--no-such", "1"], "no_such is no setting of a run"),
        (["--lora-alpha", "8"], "lora_alpha is what is swept: give alphas"),
    ],
)
def test_what_is_wrong_is_one_message(tiny_base: Path, args: list[str], said: str) -> None:  # noqa: F811
    given = ["rank", "sweep", "--model", tiny_base / "base", "--data", tiny_base / "data" / "train.jsonl", *args]
    assert said in run(*given, code=2).stderr


def test_a_rank_that_is_chosen(tiny_base: Path) -> None:  # noqa: F811
    out = tiny_base / "run"
    args = ["train", "--model", tiny_base / "base", "--data", tiny_base / "data" / "train.jsonl", *SMALL]
    args += ["--output", out, "--rank", "auto", "--target-modules", "q_proj,v_proj"]
    planned = run(*args, "--plan").stdout
    assert "a sweep would come first" in planned
    assert not out.exists()
    said = run(*args).stdout
    assert "r: auto: a sweep of ranks 1, 4, 16 comes first" in said
    advice = json.loads((out / "rank" / "sweep.json").read_text())
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == advice["take"]["r"]
    assert saved["lora_alpha"] == 32
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]
    assert advice["advice"] in (out / "adapter" / "README.md").read_text()
    written = (out / "run.yaml").read_text()
    assert f"\nr: {saved['r']}\n" in written
    assert yaml.safe_load(written)["learning_rate"] == advice["take"]["learning_rate"]
    # The file runs the same again without a sweep; another run in the folder takes the sweep away.
    run("train", out / "run.yaml", "--overwrite-output-dir")
    assert not (out / "rank").exists()


def test_a_chosen_rank_keeps_what_was_given(tiny_base: Path) -> None:  # noqa: F811
    (tiny_base / "run.yaml").write_text(
        f"model: {tiny_base / 'base'}\ndata: {tiny_base / 'data' / 'train.jsonl'}\nr: auto\nlora_alpha: 8\n"
        f"learning_rate: 2e-3\nmax_steps: 3\nprecision: fp32\noutput: {tiny_base / 'run'}\n"
    )
    run("train", tiny_base / "run.yaml")
    content = json.loads((tiny_base / "run" / "rank" / "sweep.json").read_text())
    assert (content["take"]["lora_alpha"], content["take"]["learning_rate"]) == (8, 0.002)


def test_where_no_rank_can_be_chosen(tiny_base: Path) -> None:  # noqa: F811
    base = ["train", "--model", tiny_base / "base", *SMALL, "--rank", "auto", "--output", tiny_base / "run"]
    lines = (tiny_base / "data" / "train.jsonl").read_text().splitlines()
    (tiny_base / "three.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(PeftError, match="takes 10 rows at least, and there are 3"):
        run(*base, "--data", tiny_base / "three.jsonl")
    with pytest.raises(PeftError, match="one rank for all layers"):
        run(*base, "--data", tiny_base / "data" / "train.jsonl", "--rank-pattern", "{q_proj: 4}")
    assert "r: expected a whole number" in run(*base[:-4], "--r", "some", code=2).stderr
