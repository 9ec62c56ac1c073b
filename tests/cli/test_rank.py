"""`trimtab rank`: what each verb prints, writes and refuses, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import trimtab
from tests.cli.test_cli import tiny_base  # noqa: F401  a fixture
from tests.rank.adapters import stirred
from trimtab.cli import app
from trimtab.cli.rank import _bytes
from trimtab.errors import AdapterFileError, BaseModelError, PeftError


@pytest.fixture
def place(tiny_base: Path) -> Path:  # noqa: F811
    """A folder with a base model, an adapter of it with a few layers, and data."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base / "base")
    config = trimtab.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    stirred(trimtab.get_peft_model(base, config), size=0.2).save_pretrained(tiny_base / "adapter")
    return tiny_base


def run(*args: Any, code: int = 0) -> str:
    """What a command prints; errors that trimtab raises on purpose are raised."""
    done = CliRunner().invoke(app, ["rank", *map(str, args)], env={"COLUMNS": "200"})
    if isinstance(done.exception, PeftError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_inspect(place: Path) -> None:
    out = run("inspect", place / "adapter", "--plot", place / "x.png")
    assert "LORA adapter in" in out
    assert "model.layers.1.mlp.down_proj" in out
    assert "intruders" not in out
    assert (place / "x.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("inspect", place / "adapter", "--json"))
    assert [x["rank"] for x in found["layers"]] == [4] * 4
    assert found["layers"][0]["effective"].keys() == {"energy90", "energy99", "entropy", "stable"}
    out = run("inspect", place / "adapter", "--intruders")  # the base that the adapter names
    assert "intruders" in out
    assert (
        json.loads(run("inspect", place / "adapter", "--model", place / "base", "--json"))["layers"][0]["relative"] > 0
    )


def test_resize(place: Path) -> None:
    out = run("resize", place / "adapter", "--rank", 2)
    assert "Nothing is written" in out
    assert "error of all layers together" in out
    data = place / "data" / "valid.jsonl"
    out = run("resize", place / "adapter", "--global", 0.9, "--output", place / "new", "--data", data, "--limit", 4)
    assert "Held-out loss:" in out
    assert f"Written to {place / 'new'}" in out
    config = trimtab.PeftConfig.from_pretrained(place / "new")
    assert config.base_model_name_or_path == str(place / "base")
    done = json.loads(run("resize", place / "adapter", "--max-size", "3kB", "--json"))
    assert done["bytes"] <= 3000
    assert 0 < done["relative"] < 1
    assert "layers.0.self_attn.q_proj" in run("resize", place / "adapter", "--energy", 0.5)


def test_mend(place: Path) -> None:
    data = place / "data" / "valid.jsonl"
    args = ["mend", place / "adapter", "-o", place / "new", "--epsilon", 0.9, "--lambda", 0.5]
    out = run(*args, "--data", data, "--limit", 4)
    assert "of 4 layers were scaled down" in out
    assert "Held-out loss:" in out
    done = json.loads(run(*args, "--json"))
    assert done["intruders"] > 0
    assert done["score"] is None
    assert (place / "new" / "adapter_model.safetensors").is_file()


def test_suggest(place: Path) -> None:
    args = ["suggest", "--model", place / "base", "--data", place / "data" / "train.jsonl"]
    out = run(*args)
    assert "16 rows train" in out
    assert "capacity is no limit" in out
    assert "all-linear: q_proj" in out
    assert "gradient" not in out
    found = json.loads(run(*args, "--estimate", "--rows", 8, "--json"))
    assert len(found["estimates"]) == 14
    assert found["suggestion"]["rank"] == 1
    config = trimtab.LoraConfig(target_modules="all-linear", **found["config"])
    assert config.resolve(found["estimates"][0]["path"]).r == found["estimates"][0]["rank"]
    assert "Half of the layers need no more than r=" in run(*args, "--estimate", "--rows", 8)


def test_many_layers_are_shown_by_module(place: Path, tmp_path: Path) -> None:
    from tests.models import llama

    model = stirred(
        trimtab.get_peft_model(llama(num_hidden_layers=12), trimtab.LoraConfig(target_modules="all-linear"))
    )
    model.save_pretrained(tmp_path)
    assert "q_proj x 12" in run("inspect", tmp_path)
    assert "model.layers.11.self_attn.q_proj" in run("inspect", tmp_path, "--layers")
    assert "\nup_proj x 12 " in run("resize", tmp_path, "--rank", 2)
    assert "model.layers.11.mlp.up_proj" in run("resize", tmp_path, "--rank", 2, "--layers")


def test_what_is_wrong_is_one_message(place: Path) -> None:
    with pytest.raises(AdapterFileError, match="no such folder"):
        run("inspect", place / "nothing")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        run("inspect", place / "adapter", "--model", place / "nothing")
    with pytest.raises(PeftError, match="Give one of"):
        run("resize", place / "adapter")
    assert "give --output" in run("resize", place / "adapter", "--rank", 1, "--data", __file__, code=2)
    assert "no size" in run("resize", place / "adapter", "--max-size", "much", code=2)
    assert "does not exist" in run("suggest", "--model", "x", "--data", place / "none.jsonl", code=2)


@pytest.mark.parametrize(
    ("text", "size"), [("2MB", 2_000_000), ("500 kB", 500_000), ("1.5MiB", 1_572_864), ("700", 700), ("3b", 3)]
)
def test_sizes(text: str, size: int) -> None:
    assert _bytes(text) == size
