"""`trimtab methods`: the capability table follows from the classes."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from trimtab.cli import app
from trimtab.methods import METHODS, capabilities, method_class
from trimtab.methods.lora import VARIANTS


def test_a_row_for_each_method_and_variant() -> None:
    rows = {row.method: row for row in capabilities()}
    assert rows.keys() == {*METHODS, *(f"LORA ({field})" for field in VARIANTS)}
    assert all(row.formula and row.kinds for row in rows.values())
    assert rows["IA3"].formula == "W' = diag(l) W;   feed-forward: W' = W diag(l)."
    assert "2205.05638" in rows["IA3"].paper
    assert not rows["LN_TUNING"].fused
    assert not rows["PREFIX_TUNING"].mergeable


def test_facts_are_the_classes() -> None:
    from trimtab import OFTConfig

    (row,) = (row for row in capabilities() if row.method == "OFT")
    method = method_class(OFTConfig())
    assert (set(row.kinds), row.fused, row.mergeable) == (method.kinds, method.fused, method.mergeable)


def test_the_command_prints_it() -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["methods"])
    assert result.exit_code == 0
    assert all(name in result.output for name in METHODS)


def test_the_page_in_the_docs_is_what_the_command_prints() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    assert printed.strip() in page, "run `trimtab methods --markdown` and put its table into docs/methods.md"
