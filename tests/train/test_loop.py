"""The loop trains what is trainable, every trained token of a step alike, and tells its events what happens."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from trimtab.train.batches import Batches
from trimtab.train.data import collate, encode_rows
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.events import EarlyStopping, Evaluate, Interrupt, Metrics, Schedule, StepOne, Trackers
from trimtab.train.generate import complete, exact_match, generate_ids, references
from trimtab.train.loop import Event, TrainError, loss_of, train
from trimtab.train.plot import plot_losses
from trimtab.train.progress import Progress, clock, size

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(10)]


@pytest.fixture
def rows(tokenizer):
    return encode_rows(ROWS, tokenizer)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adamw(model, lr: float = 1e-3) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_frozen_parameters_alone(model, tokenizer, rows) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("embed" not in name)
    before = parameters(model)
    first = evaluate_loss(model.eval(), rows).loss
    batches = Batches(rows, epochs=40)
    result = train(model, batches, adamw(model, 5e-3), [Schedule("linear", 8)])
    assert result.step == len(batches) == 80  # 2 batches an epoch
    assert evaluate_loss(model, rows).loss < 0.1 * first
    assert exact_match(complete(model, tokenizer, rows, 8), references(tokenizer, rows)) == 1.0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    assert model.training is False  # as it was


def test_accumulation_equals_the_large_batch(model_factory, rows) -> None:
    trained = []
    for batch_size, accumulate in ((10, 1), (3, 4)):  # batches of 3, 3, 3 and 1 rows, of unlike lengths
        model = model_factory()
        batches = Batches(rows, batch_size, accumulate, max_steps=1)
        trained.append((train(model, batches, adamw(model)).losses[0][1], parameters(model)))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-6)
    for name, p in trained[0][1].items():
        torch.testing.assert_close(p, trained[1][1][name], rtol=0, atol=2e-5)


def test_skipping_the_head_changes_no_loss_and_no_gradient(model, rows) -> None:
    loss = loss_of(model, rows)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model(**collate(rows)).loss
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_or_not(model_factory, rows) -> None:
    norms = []

    class Look(Event):
        def gradients(self, run) -> None:
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters())))

    for limit in (0.01, 0.0):
        model = model_factory()
        train(model, Batches(rows, max_steps=1), adamw(model), [Look()], max_grad_norm=limit)
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


# --- the plan of batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "max_steps", "accumulate"), [(3, -1, 1), (2.5, -1, 2), (0.1, -1, 1), (1, 7, 2)])
def test_every_row_is_learned_as_often_as_asked(rows, epochs, max_steps, accumulate) -> None:
    batches = Batches(rows, 3, accumulate, epochs, max_steps, seed=4)
    an_epoch = -(-4 // accumulate)  # 10 rows in batches of 3
    assert len(batches) == (max_steps if max_steps > 0 else max(1, round(epochs * an_epoch)))
    seen = [i for step in range(len(batches)) for batch in batches[step] for i in batch.rows]
    whole = len(batches) // an_epoch * len(rows)
    assert sorted(seen[:whole]) == sorted([*range(10)] * (len(batches) // an_epoch))
    assert len(set(seen[whole:])) == len(seen[whole:])
    assert batches.tokens() == sum(len(rows[i].ids) for i in seen)
    assert [s for s in range(1, len(batches) + 1) if batches.ends_epoch(s)] == sorted(
        {*range(an_epoch, len(batches) + 1, an_epoch), len(batches)}
    )
    assert batches.epoch(len(batches)) == pytest.approx(len(batches) / an_epoch)
    again = Batches(rows, 3, accumulate, epochs, max_steps, seed=4)
    assert [again[s] for s in range(len(again))] == [batches[s] for s in range(len(batches))]


def test_no_rows_nothing_trainable(model, rows) -> None:
    with pytest.raises(TrainError, match="no rows"):
        Batches([])
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(TrainError, match="nothing to train"):
        train(model, Batches(rows), optimizer)


# --- losses that are no numbers --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_rows_that_make_it(model, rows) -> None:
    bad = rows[7].ids[0]
    only = [i for i, e in enumerate(rows) if bad in e.ids]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan
    assert 0 < len(only) <= len(rows)
    names = [f"rows.csv, row {i + 1}" for i in range(len(rows))]
    with pytest.raises(TrainError, match=r"loss is nan at step 1") as caught:
        train(model, Batches(rows, 10, names=names), adamw(model))
    assert all((f"row {i + 1}" in str(caught.value)) for i in only)


def test_a_token_of_one_row_is_found_among_many(model, tokenizer) -> None:
    rows = encode_rows([*ROWS, {"prompt": "Z", "completion": "z"}], tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z").input_ids[0]] = math.nan
    before = parameters(model)
    with pytest.raises(TrainError, match=r"these rows alone, and not for the 10 others of the step: row 11\.$"):
        train(model, Batches(rows, 11), adamw(model))
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


def test_a_broken_base_and_a_rate_too_high_are_told_apart(model_factory, rows) -> None:
    model = model_factory()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainError, match=r"before anything was trained.*row 1, row 2.*look at the base model"):
        train(model, Batches(rows, 10), adamw(model))
    model = model_factory()
    with pytest.raises(TrainError, match=r"at step 2.*row \d.*the learning rate, 1e\+30 here, is too high"):
        train(model, Batches(rows, 5, epochs=20), torch.optim.SGD(model.parameters(), lr=1e30), max_grad_norm=0)


# --- events ----------------------------------------------------------------------------------------------------------


def test_hooks_come_in_their_order_and_functions_after_each_step(model, rows) -> None:
    seen = []

    class Every(Event):
        pass

    for name in ("begin", "before", "gradients", "updated", "step", "end", "close"):
        setattr(Every, name, lambda self, run, name=name: seen.append(name))
    train(model, Batches(rows, max_steps=2), adamw(model), [Every(), lambda run: seen.append(run.step)])
    a_step = ["before", "gradients", "updated", "step"]
    assert seen == ["begin", *a_step, 1, *a_step, 2, "end", "close"]


def test_metrics_and_the_schedule(model, rows, tmp_path) -> None:
    score = Evaluate(lambda model: {"loss": evaluate_loss(model, rows[:2]).loss}, every=4)
    events = [Schedule("linear", 2), Metrics(tmp_path / "metrics.jsonl"), score]
    result = train(model, Batches(rows, epochs=5), adamw(model), events)
    steps = [m for m in metrics(tmp_path) if "loss" in m]
    expected = [0.5e-3, 1e-3, *(1e-3 * (10 - i) / 8 for i in range(2, 10))]
    assert [m["learning_rate"] for m in steps] == pytest.approx(expected)
    assert [(m["step"], m["loss"]) for m in steps] == result.losses
    assert all(m["grad_norm"] > 0 and m["tokens"] > 0 and m["tokens_per_second"] > 0 for m in steps)
    assert [(m["step"], m["eval_loss"]) for m in metrics(tmp_path) if "eval_loss" in m] == result.eval_losses
    assert [step for step, _ in result.eval_losses] == [0, 4, 8, 10]
    assert result.tokens == 5 * sum(len(e.ids) for e in rows)


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 2, 4, 5]), (-1, [0, 5]), (3, [0, 3, 5])])
def test_when_it_is_evaluated(model, rows, every, steps) -> None:
    events = [Evaluate(lambda model: {"loss": 1.0}, every)]
    result = train(model, Batches(rows, max_steps=5), adamw(model), events)
    assert [step for step, _ in result.scores] == steps


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_start_at_the_full_rate_and_keep_the_groups_apart(name, model, rows) -> None:
    halves = [list(model.parameters())[:5], list(model.parameters())[5:]]
    optimizer = torch.optim.AdamW([{"params": halves[0], "lr": 1e-3}, {"params": halves[1], "lr": 4e-3}])
    rates = []
    look = lambda run: rates.append([g["lr"] for g in run.optimizer.param_groups])
    train(model, Batches(rows, max_steps=6), optimizer, [Schedule(name), look])
    assert rates[0] == [1e-3, 4e-3]
    assert [a for a, _ in rates] == sorted((a for a, _ in rates), reverse=True)
    assert all(b == pytest.approx(4 * a) and a > 0 for a, b in rates)


def test_early_stopping_waits_for_its_patience(model, rows) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.2, 3.9, 4.1, 4.0, 3.0])
    events = [Evaluate(lambda model: {"loss": next(losses)}, every=1), EarlyStopping(2)]
    result = train(model, Batches(rows, max_steps=20), adamw(model), events)
    assert result.step == 3
    assert result.best == (1, 4.0)
    assert result.stopped == "2 evaluations were no better than the best, step 1"
    again = train(model, Batches(rows, max_steps=20), adamw(model), events, result=result)
    assert again.step == 3, "a resumed run knows that it was stopped"


def test_other_scores_are_better_when_higher(model, rows) -> None:
    scores = iter([0.0, 0.3, 0.5, 0.4])
    event = Evaluate(lambda model: {"loss": 1.0, "exact_match": next(scores)}, every=1, best_by="exact_match")
    assert train(model, Batches(rows, max_steps=3), adamw(model), [event]).best == (2, 0.5)


@pytest.fixture
def heard():
    """Ctrl-C is heard, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_once_ends_after_the_step_twice_at_once(model, rows, heard) -> None:
    said = []

    class Press(Event):
        def __init__(self, at: dict[int, str]) -> None:
            self.at = at

        def before(self, run) -> None:
            if self.at.get(run.step) == "twice":
                signal.raise_signal(signal.SIGINT)
            if run.step in self.at:
                signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result = train(model, Batches(rows, max_steps=9), adamw(model), [Interrupt(said.append), Press({3: "once"})])
    assert (result.step, result.stopped) == (4, Interrupt.REASON)
    assert said == ["Stopping after this step. Once more stops at once."]
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        train(model, Batches(rows, max_steps=9), adamw(model), [Interrupt(said.append), Press({3: "twice"})])
    assert signal.getsignal(signal.SIGINT) is handler


def test_step_one_names_tensors_without_a_gradient(model, rows) -> None:
    said = []
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    train(model, Batches(rows, max_steps=2), adamw(model), [StepOne(said.append)])
    assert len(said) == 1
    assert said[0].endswith("trainable tensors got no gradient in step 1: idle")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "idle")
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(model, Batches(rows, max_steps=2), adamw(model), [StepOne(said.append)])


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_plain_progress_lines_tell_loss_speed_time_left_and_memory(model, rows, capsys) -> None:
    events = [Progress(every=0), Evaluate(lambda model: {"loss": 2.5, "exact_match": 0.25})]
    train(model, Batches(rows, max_steps=3), adamw(model), events)
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if "held-out" not in line]
    assert len(lines) == 3
    assert all(word in lines[0] for word in ("step 1/3", "loss", "tokens/s", "left", "B"))
    assert "0:00 left" in lines[-1]
    assert "step 2: held-out loss 2.5000, exact match 25.0%" in said[3]
    assert (clock(75), clock(3661), size(1_900_000_000), size(2_500)) == ("1:15", "1:01:01", "1.9 GB", "2.5 kB")


def test_a_batch_generates_what_each_prompt_does_alone(model, rows) -> None:
    prompts = [e.ids[: e.prompt_length] for e in rows[:4]] + [[5, 6, 7]]
    together = generate_ids(model, prompts, pad_id=0, max_new_tokens=6)
    assert together == [generate_ids(model, [p], pad_id=0, max_new_tokens=6)[0] for p in prompts]


def test_plot(model, rows, tmp_path) -> None:
    events = [Evaluate(lambda model: {"loss": 2.5})]
    result = train(model, Batches(rows, max_steps=5), adamw(model), events)
    path = plot_losses(result, tmp_path / "new" / "loss.png", title="tiny")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_trackers_get_settings_steps_and_scores(model, rows, tmp_path) -> None:
    from accelerate import PartialState
    from accelerate.logging import get_logger
    from accelerate.tracking import GeneralTracker

    class Mine(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None
        main_process_only = False  # as wandb's and trackio's: accelerate does not look for the processes by itself

        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def start(self) -> None:
            get_logger("mine").debug("accelerate's trackers write such lines")

        def store_init_configuration(self, values: dict) -> None:
            self.seen.append(values)

        def log(self, values: dict, step: int | None = None, **kwargs) -> None:
            self.seen.append((step, values))

        def finish(self) -> None:
            self.seen.append("finished")

    mine = Mine()
    PartialState._reset_state()  # as in a new process
    events = [Trackers([mine], tmp_path, "run", {"r": 4, "x": [1]}), Evaluate(lambda model: {"loss": 2.0}, every=-1)]
    train(model, Batches(rows, max_steps=2), adamw(model), events)
    assert mine.seen[0] == {"r": 4, "x": "[1]"}
    assert mine.seen[1] == (0, {"eval/loss": 2.0})
    assert [entry[0] for entry in mine.seen[1:-1]] == [0, 1, 2, 2]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= mine.seen[2][1].keys()
    assert mine.seen[-1] == "finished"
    with pytest.raises(TrainError, match=r"report_to: nope is unknown; accelerate knows .*tensorboard"):
        Trackers(["nope"], tmp_path, "run", {})
