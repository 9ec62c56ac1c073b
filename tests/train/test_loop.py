"""The loop trains what is trainable, resumes exactly, stops cleanly, and reports what it did."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from trimtab.train.data import encode_rows
from trimtab.train.generate import complete, exact_match, generate_ids, references
from trimtab.train.loop import TrainError, TrainingArguments, evaluate, loss_of, train
from trimtab.train.plot import plot_losses
from trimtab.train.progress import Progress, clock

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(10)]


@pytest.fixture
def rows(tokenizer):
    return encode_rows(ROWS, tokenizer)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_frozen_parameters_alone(model, tokenizer, rows) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("embed" not in name)
    before = parameters(model)
    first = evaluate(model.eval(), rows)
    result = train(model, rows, TrainingArguments(learning_rate=5e-3, num_train_epochs=40), valid=rows)
    assert result.step == 80  # 2 batches an epoch
    assert result.eval_losses[-1][0] == 80
    assert result.eval_losses[-1][1] == pytest.approx(evaluate(model, rows), rel=1e-6)
    assert result.eval_losses[-1][1] < 0.1 * first
    assert exact_match(complete(model, tokenizer, rows, 8), references(tokenizer, rows)) == 1.0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    assert model.training is False  # as it was


def test_the_same_seed_gives_the_same_run(model_factory, rows) -> None:
    def run(seed: int) -> list[tuple[int, float]]:
        model = model_factory(dropout=0.3).train()
        return train(model, rows, TrainingArguments(max_steps=4, seed=seed)).losses

    assert run(1) == run(1)
    assert run(1) != run(2)


class StopAt(Progress):
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, tokens: int, where: str, loss: float, seconds: float) -> None:
        super().step(tokens, where, loss, seconds)
        if where.startswith(f"step {self.at}/"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", ["ctrl-c", "killed later"])
def test_a_resumed_run_equals_one_without_a_break(how, model_factory, rows, tmp_path) -> None:
    def args(folder: str) -> TrainingArguments:
        return TrainingArguments(
            learning_rate=1e-3, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
            output_dir=str(tmp_path / folder),
        )  # fmt: skip

    whole = model_factory(dropout=0.3)
    expected = train(whole, rows, args("whole"), valid=rows[:3])

    if how == "ctrl-c":  # stops at step 5, saved there
        broken = train(model_factory(dropout=0.3), rows, args("broken"), valid=rows[:3], progress=StopAt(5))
        assert broken.interrupted
        assert broken.step == 5
    else:  # died at step 7: the last checkpoint is of step 6, and metrics go further
        with pytest.raises(KeyError, match="died"):
            train(model_factory(dropout=0.3), rows, args("broken"), valid=rows[:3], progress=DieAt(7))
    torch.manual_seed(123)  # the state of this process must not matter
    resumed = model_factory(seed=9, dropout=0.3)
    result = train(resumed, rows, args("broken"), valid=rows[:3], resume=True)
    assert not result.interrupted
    assert result.losses == expected.losses
    assert result.eval_losses == expected.eval_losses
    assert result.tokens == expected.tokens
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    drop = ("tokens_per_second",)
    lines = [
        [{k: v for k, v in m.items() if k not in drop} for m in metrics(tmp_path / f)] for f in ("whole", "broken")
    ]
    assert lines[0] == lines[1]


class DieAt(StopAt):
    def step(self, tokens: int, where: str, loss: float, seconds: float) -> None:
        if where.startswith(f"step {self.at}/"):
            raise KeyError("died")


def test_without_a_checkpoint_resume_starts(model, rows, tmp_path) -> None:
    assert train(model, rows, TrainingArguments(max_steps=1, output_dir=str(tmp_path)), resume=True).step == 1


def test_the_checkpoint_of_another_run_is_refused(model, rows, tmp_path) -> None:
    train(model, rows, TrainingArguments(max_steps=2, save_steps=1, output_dir=str(tmp_path)))
    other = TrainingArguments(max_steps=2, learning_rate=1.0, output_dir=str(tmp_path))
    with pytest.raises(TrainError, match="another run: learning_rate, training rows changed"):
        train(model, rows[:-1], other, resume=True)


def test_a_new_run_starts_a_new_metrics_file(model, rows, tmp_path) -> None:
    for _ in range(2):
        train(model, rows, TrainingArguments(max_steps=2, output_dir=str(tmp_path)))
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2]


def test_metrics_and_the_schedule(model, rows, tmp_path) -> None:
    args = TrainingArguments(
        learning_rate=1.0e-3, num_train_epochs=5, warmup_ratio=0.2, eval_steps=4, output_dir=str(tmp_path)
    )
    result = train(model, rows, args, valid=rows[:2])
    steps = [m for m in metrics(tmp_path) if "loss" in m]
    assert [m["learning_rate"] for m in steps] == pytest.approx(
        [0.5e-3, 1e-3, *(1e-3 * (10 - i) / 8 for i in range(2, 10))]
    )
    assert [(m["step"], m["loss"]) for m in steps] == result.losses
    assert all(m["grad_norm"] > 0 and m["tokens"] > 0 and m["tokens_per_second"] > 0 for m in steps)
    assert [(m["step"], m["eval_loss"]) for m in metrics(tmp_path) if "eval_loss" in m] == result.eval_losses
    assert [step for step, _ in result.eval_losses] == [4, 8, 10]
    assert result.tokens == 5 * sum(len(e.ids) for e in rows)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_start_at_the_full_rate(name, model, rows, tmp_path) -> None:
    args = TrainingArguments(max_steps=6, warmup_ratio=0, lr_scheduler_type=name, output_dir=str(tmp_path))
    train(model, rows, args)
    rates = [m["learning_rate"] for m in metrics(tmp_path)]
    assert rates[0] == args.learning_rate
    assert rates[-1] > 0
    assert rates == sorted(rates, reverse=True)


def test_accumulation_equals_the_large_batch(model_factory, rows) -> None:
    trained = []
    for size, accumulate in ((10, 1), (3, 4)):  # batches of 3, 3, 3 and 1 rows, of unlike lengths
        model = model_factory()
        args = TrainingArguments(
            learning_rate=1e-3, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate
        )
        losses = train(model, rows, args).losses
        trained.append((losses[0][1], parameters(model)))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-6)
    for name, p in trained[0][1].items():
        torch.testing.assert_close(p, trained[1][1][name], rtol=0, atol=2e-5)


def test_skipping_the_head_changes_no_loss_and_no_gradient(model, rows) -> None:
    from trimtab.train.data import collate

    loss = loss_of(model, rows)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model(**collate(rows)).loss
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_evaluate_weighs_tokens_not_batches(model, rows) -> None:
    assert evaluate(model, rows, batch_size=1) == pytest.approx(evaluate(model, rows, batch_size=10), rel=1e-5)


def test_nothing_trainable_no_rows_and_a_loss_that_is_not_finite(model, rows) -> None:
    with pytest.raises(TrainError, match="no rows"):
        train(model, [], TrainingArguments())
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    before = parameters(model)
    with pytest.raises(TrainError, match=r"loss is nan at step 1, on rows \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10\]"):
        train(model, rows, TrainingArguments(per_device_train_batch_size=10))
    assert all(torch.equal(p, before[n]) or n == "lm_head.weight" for n, p in model.named_parameters())
    model.requires_grad_(False)
    with pytest.raises(TrainError, match="nothing to train"):
        train(model, rows, TrainingArguments())


def test_a_failed_save_leaves_the_old_checkpoint(model, rows, tmp_path) -> None:
    args = TrainingArguments(max_steps=2, save_steps=1, output_dir=str(tmp_path))
    train(model, rows, args)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint.pt", "metrics.jsonl"]  # nothing temporary left
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["result"]["step"] == 2


def test_a_batch_generates_what_each_prompt_does_alone(model, rows) -> None:
    prompts = [e.ids[: e.prompt_length] for e in rows[:4]] + [[5, 6, 7]]
    together = generate_ids(model, prompts, pad_id=0, max_new_tokens=6)
    assert together == [generate_ids(model, [p], pad_id=0, max_new_tokens=6)[0] for p in prompts]


def test_plain_progress_lines_tell_loss_speed_and_time_left(model, rows, capsys) -> None:
    train(model, rows, TrainingArguments(max_steps=3), valid=rows, progress=Progress(every=0))
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out" not in line]
    assert len(lines) == 3
    assert all(word in lines[0] for word in ("step 1/3", "loss", "tokens/s", "left"))
    assert "0:00 left" in lines[-1]
    assert (clock(75), clock(3661)) == ("1:15", "1:01:01")


def test_plot(model, rows, tmp_path) -> None:
    result = train(model, rows, TrainingArguments(max_steps=5), valid=rows)
    path = plot_losses(result, tmp_path / "new" / "loss.png", title="tiny", first=5.7)
    assert path.read_bytes().startswith(b"\x89PNG")
