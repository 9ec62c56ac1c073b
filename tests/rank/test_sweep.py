"""Sweeps on tiny models: a task whose rank is known, a flat one, what is kept and not repeated, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.models import assert_untouched, llama, snapshot
from tests.train.conftest import make_model, make_tokenizer
from trimtab.errors import ConfigError, DataError, TrainError
from trimtab.rank.sweep.result import FINISHED, GIVEN_UP, Sweep, plain, read_outcome
from trimtab.rank.sweep.run import Prepared, prepare_sweep
from trimtab.rank.sweep.space import Space
from trimtab.rank.sweep.trainers import train_serially, train_together
from trimtab.train.config import TrainConfig
from trimtab.train.example import Example
from trimtab.train.model import Base
from trimtab.train.precision import Precision
from trimtab.train.preparation import Data
from trimtab.train.prepare import Prepared as Encoded
from trimtab.train.prepare import Report
from trimtab.train.report import console_for

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
QUIET = console_for(quiet=True)
VOCABULARY, TEACHER = 300, 4


def encoded(ids: Tensor) -> Encoded:
    rows = [Example(row, row, 0) for row in ids.tolist()]
    return Encoded(rows, [f"row {i}" for i in range(len(rows))], Report("planted"))


def planted(rank: int) -> tuple[Any, Data]:
    """A base that says every token equally often, and rows that a teacher wrote whose head differs by a delta.

    Its singular values are alike, so that each rank of it is worth as much.
    """
    base, teacher = (llama(vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=False) for _ in range(2))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        base.lm_head.weight.zero_()
        v = torch.linalg.qr(torch.randn(16, rank, generator=draw)).Q  # (width, rank)
        teacher.lm_head.weight[:] = 1.5 * torch.randn(VOCABULARY, rank, generator=draw) @ v.T
        ids = torch.randint(0, VOCABULARY, (400, 1), generator=draw)
        for _ in range(15):
            ids = torch.cat([ids, torch.multinomial(teacher(ids).logits[:, -1].softmax(-1), 1, generator=draw)], 1)
    return base, Data(encoded(ids[:320]), encoded(ids[320:]))


def sweep_of(base: Any, data: Data, output: Path, space: Space, **settings: Any) -> Prepared:
    config = TrainConfig(
        data="rows.jsonl", output=str(output), **{"max_steps": 60, "per_device_train_batch_size": 32, **settings}
    )
    found = Base(base, make_tokenizer(), "base", Precision("fp32", "a test"))
    return prepare_sweep(config, space, base=found, data=data)


def test_the_rank_of_a_planted_delta_is_found(tmp_path: Path) -> None:
    base, data = planted(TEACHER)
    before = snapshot(base)
    space = Space(ranks=(1, 2, 4, 8), rates=(1e-2, 3e-2), alphas=(16,), targets=("lm_head",))
    found = sweep_of(base, data, tmp_path / "s", space).run(0, QUIET)
    assert_untouched(base, before)
    losses = {p.setting.rank: p.loss for p in found.curve.points}
    assert found.take["r"] == TEACHER, losses
    assert "Take r=4 with lora_alpha=16" in found.advice
    assert "r=2 is worse by" in found.advice
    assert losses[1] > losses[2] > losses[4] + 0.05
    assert not found.curve.verdict.flat
    assert [p.parameters for p in found.curve.points] == [r * (300 + 16) for r in (1, 2, 4, 8)]
    assert all(len(p.losses) == 2 for p in found.curve.points)


def test_a_task_without_need_of_rank_is_called_flat(tmp_path: Path) -> None:
    base, data = planted(1)
    space = Space(ranks=(1, 4), rates=(3e-2,), alphas=(16,), targets=("lm_head",))
    found = sweep_of(base, data, tmp_path / "s", space, max_steps=40).run(0, QUIET)
    assert found.curve.verdict.flat
    assert found.take["r"] == 1
    assert "The curve is flat" in found.advice
    assert "capacity is not the limit" in found.advice
    assert "asks for r=16; measured was less" in found.advice, "4,800 tokens over 316 parameters a rank"


def test_runs_that_train_at_once_come_out_as_one_after_the_other(tmp_path: Path) -> None:
    """More of them than adapters that are out of use stay in the module tree."""
    base, data = planted(2)
    space = Space(ranks=tuple(range(1, 11)), rates=(1e-2,), alphas=(16,), targets=("lm_head",))
    found = []
    for place, train in (("at_once", train_together), ("serial", train_serially)):
        whole = sweep_of(base, data, tmp_path / place, space, max_steps=4)
        whole.work.train = train
        found.append([p.losses for p in whole.run(0, QUIET).curve.points])
    for own, other in zip(*found, strict=True):
        assert own == pytest.approx(other, rel=1e-5)
    assert len(set(found[0])) == 10


def test_nothing_to_learn_is_said(tmp_path: Path) -> None:
    base, data = planted(1)
    data.train = encoded(torch.randint(0, 300, (40, 8), generator=torch.Generator().manual_seed(0)))
    data.valid = encoded(torch.randint(0, 300, (30, 8), generator=torch.Generator().manual_seed(1)))
    space = Space(ranks=(1, 2), rates=(3e-2,), targets=("lm_head",))
    found = sweep_of(base, data, tmp_path / "s", space, max_steps=20).run(0, QUIET)
    assert "Nothing was learned" in found.advice


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny base, rows, and the working directory in it."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{i % 12}+{i}=", "completion": str(i + i % 12)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def small(place: Path, **changes: Any) -> Sweep:
    given = {
        "model": str(place / "base"), "data": str(place / "rows.jsonl"), "output": str(place / "out"), "max_steps": 8,
        "precision": "fp32", "ranks": [1, 2], "rates": [1e-4, 1e-3, 1e-2], "console": QUIET,
    }  # fmt: skip
    return trimtab.rank_sweep(**{**given, **changes})


def same_losses(one: Sweep, other: Sweep) -> None:
    """Runs that share their passes with other runs come out the same but for rounding."""
    for own, theirs in zip(one.curve.points, other.curve.points, strict=True):
        assert own.setting == theirs.setting
        assert own.losses == pytest.approx(theirs.losses, rel=1e-5)


def test_what_is_written(place: Path) -> None:
    found = small(place)
    assert (found.rows, found.held_out, found.steps) == (32, 8, 8)
    content = json.loads((place / "out" / "sweep.json").read_text())
    assert content["advice"] == found.advice
    assert found.advice in (place / "out" / "table.md").read_text()
    assert (place / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    outcomes = [read_outcome(json.loads(p.read_text())) for p in (place / "out" / "runs").glob("*/run.json")]
    assert len(outcomes) == 2 * 3 + 2, "two of three rates are given up"
    for outcome in outcomes:
        assert read_outcome(json.loads(json.dumps(plain(outcome)))) == outcome
        assert (outcome.ended == FINISHED) == bool(outcome.folder)
    finished = [o for o in outcomes if o.ended == FINISHED]
    assert {(o.trial.setting.rank, o.trial.seed) for o in finished} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    # What is kept of the best run does what it was scored by.
    best = min(found.curve.chosen.runs, key=lambda run: run.score.loss)
    config = trimtab.PeftConfig.from_pretrained(place / "out" / "adapter")
    assert (config.r, config.lora_alpha) == (found.take["r"], 32)
    assert config.base_model_name_or_path == str(place / "base")
    model = trimtab.AutoPeftModelForCausalLM.from_pretrained(place / "out" / "adapter")
    work = prepare_sweep(
        TrainConfig(model=str(place / "base"), data=str(place / "rows.jsonl"), max_steps=8, output=str(place / "x"),
                    precision="fp32"), Space(ranks=(1,)),
    ).work  # fmt: skip
    assert work.scorer.whole(model).loss == pytest.approx(best.score.loss, rel=1e-5)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == best.parameters


def test_rates_that_lag_are_given_up_and_no_rank_is(place: Path) -> None:
    found = small(place, rates=[1e-9, 1e-3, 3e-2])
    for point in found.curve.points:
        assert point.rate != 1e-9
        assert set(point.tried) == {1e-9, 1e-3, 3e-2}
    runs = {p.name: json.loads((p / "run.json").read_text()) for p in (place / "out" / "runs").iterdir()}
    gone = {name for name, content in runs.items() if content["ended"] == GIVEN_UP}
    assert len(gone) == 2 * 2
    assert all(not (place / "out" / "runs" / name / "adapter").exists() for name in gone)


def test_what_is_over_is_not_repeated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small(place, ranks=[1])
    assert (first.done, first.repeated) == (2, 0)
    again = small(place, ranks=[1])
    assert again.done == 0
    assert again.advice == first.advice
    assert [p.losses for p in again.curve.points] == [p.losses for p in first.curve.points]
    more = small(place, ranks=[1, 2])
    assert more.done
    assert {p.setting.rank for p in more.curve.points} == {1, 2}
    # The same as if both had been there from the start.
    whole = small(place, ranks=[1, 2], output=str(place / "whole"))
    same_losses(more, whole)
    with pytest.raises(TrainError, match=r"another sweep.*max_steps \(8 then, 9 now\)"):
        small(place, max_steps=9)
    with pytest.raises(TrainError, match="another sweep"):
        small(place, eval_data=str(place / "rows.jsonl"))


def test_a_sweep_that_is_interrupted_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.rank.sweep.store import Store

    whole = small(place, output=str(place / "whole"))
    save, count = Store.save, 0

    def stops(self: Store, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return save(self, *args)

    monkeypatch.setattr(Store, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        small(place)
    monkeypatch.undo()
    found = small(place)
    assert found.repeated == 3
    same_losses(found, whole)


def test_sizes_alphas_and_layers(place: Path) -> None:
    found = small(place, rates=[1e-3], data_sizes=[10, 32], alphas=[4, 32], targets=["q_proj,v_proj", "all-linear"])
    assert [c.rows for c in found.curves] == [10, 32]
    assert all(len(c.points) == 2 * 2 * 2 for c in found.curves)
    assert (place / "out" / "sweep.png").is_file()
    assert "10 rows to learn" in (place / "out" / "table.md").read_text()
    sizes = {(p.setting.targets, p.setting.rank): p.parameters for p in found.curve.points}
    assert sizes["all-linear", 2] == 2 * sizes["all-linear", 1] > sizes["q_proj,v_proj", 2]


def test_a_rate_that_explodes_is_no_end(place: Path) -> None:
    found = small(place, rates=[1e-3, 1e18], max_grad_norm=0)
    for point in found.curve.points:
        assert point.rate == 1e-3
        assert math.isinf(point.tried[1e18]) or point.tried[1e18] > point.tried[1e-3]
    with pytest.raises(TrainError, match="No run could be finished"):
        small(place, rates=[1e30], max_grad_norm=0, output=str(place / "b"))


def test_too_few_rows(place: Path) -> None:
    lines = (place / "rows.jsonl").read_text().splitlines()
    (place / "three.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(DataError, match=r"three.jsonl has 3 row\(s\): too few"):
        small(place, data=str(place / "three.jsonl"))
    found = small(place, data=str(place / "three.jsonl"), eval_data=str(place / "rows.jsonl"), rates=[1e-3])
    assert found.rows == 3
    with pytest.raises(DataError, match="tells nothing of noise"):
        small(place, data=str(place / "rows.jsonl"), eval_data=None, val_size=1, output=str(place / "b"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": [1, 33]}, "none has room for r=33: a change of theirs has a rank of 32 at most"),
        ({"r": 4}, "r is what is swept: give ranks"),
        ({"continue_from": "x"}, "continue_from is not for a sweep"),
        ({"optimizer": "lorafa"}, "adamw"),
        ({"method": "ia3"}, "has no rank"),
        ({"method": "adalora"}, "has no rank"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"data_sizes": [99]}, "asks for 99 rows to learn from, and there are 32"),
        ({"targets": ["nothing"]}, "nothing"),
    ],
)
def test_what_is_refused(place: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        small(place, **changes)
    assert not (place / "out").exists()
