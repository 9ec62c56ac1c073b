"""Adapters that are trained at once come out as each does alone."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab import AdaLoraConfig, Job, LoraConfig, PromptTuningConfig, get_peft_model, train_many
from trimtab.errors import ConfigError, TrainError
from trimtab.train.batches import Batches
from trimtab.train.data import encode_rows
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.events import EarlyStopping, Evaluate, Schedule
from trimtab.train.loop import Event, Run, TrainResult, train
from trimtab.train.shared import passes

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i) + "!" * (i % 3)} for i in range(11)]
QV = ["q_proj", "v_proj"]
# name: (config, batches, the job's own settings)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "small": ({"r": 2, "target_modules": QV}, {"batch_size": 3, "seed": 1}, {"learning_rate": 1e-2, "seed": 3}),
    "wide": (
        {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"},
        {"batch_size": 2, "accumulate": 2, "max_steps": 9},
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    ),
    "rslora": (
        {"r": 4, "use_rslora": True, "target_modules": ["down_proj"]},
        {"batch_size": 11, "seed": 2, "epochs": 4.0},
        {"learning_rate": 5e-3, "schedule": "constant", "max_grad_norm": 0.05, "seed": 7},
    ),
    "dropped": (
        {"r": 3, "lora_dropout": 0.3, "target_modules": ["up_proj", "o_proj"]},
        {"batch_size": 4, "seed": 5},
        {"learning_rate": 1e-2, "seed": 9},
    ),
    "dora": ({"r": 2, "use_dora": True, "target_modules": QV}, {"batch_size": 3}, {"learning_rate": 1e-2}),
    "packed": (
        {"r": 2, "lora_dropout": 0.2, "target_modules": ["k_proj"]},
        {"batch_size": 1, "packed": 40, "epochs": 2.0},
        {"learning_rate": 1e-2, "seed": 4},
    ),
}


@pytest.fixture
def rows(tokenizer):
    return encode_rows(ROWS, tokenizer)


def job(name: str, rows: Any, **changes: Any) -> Job:
    fields, batches, own = KINDS[name]
    return Job(name, LoraConfig(**fields), Batches(rows, **{"epochs": 3.0, **batches}), **{**own, **changes})


def alone(model: Any, one: Job) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """A job by the plain trainer."""
    torch.manual_seed(one.seed)
    peft = get_peft_model(model, copy.deepcopy(one.config), adapter_name=one.name)
    own = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, one.learning_rate, weight_decay=one.weight_decay)
    events = [Schedule(one.schedule, one.warmup_steps), *one.events]
    result = train(peft, one.batches, optimizer, events, max_grad_norm=one.max_grad_norm, seed=one.seed)
    return result, tensors(peft, one.name)


def tensors(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if name in n.split(".")}


def same(results: Any, made: Any, jobs: list[Job], relative: float, absolute: float) -> None:
    """Every job of `results` is what it is alone, on a model that `made` gives."""
    for one in jobs:
        expected, values = alone(made(), one)
        found = results[one.name]
        assert [step for step, _ in found.losses] == [step for step, _ in expected.losses]
        for (_, a), (_, b) in zip(found.losses, expected.losses, strict=True):
            assert a == pytest.approx(b, rel=relative), one.name
        own = tensors(results.model, one.name)
        assert own.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=absolute, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("tokens", [60, 4096])
def test_in_double_precision_parameters_are_those_of_running_alone(model_factory, rows, tokens: int) -> None:
    made = lambda: model_factory().double()
    jobs = [job(name, rows) for name in KINDS]
    results = train_many(made(), [job(name, rows) for name in KINDS], tokens=tokens)
    same(results, made, jobs, 1e-9, 1e-9)
    assert all(not result.stopped for result in results.values())


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_with_dropout_each_comes_out_as_alone(model_factory, rows, data) -> None:
    """Whatever its rank, probability, layers and rows beside it: LoRAs without and with dropout share products."""
    made = lambda: model_factory().double()
    shapes = [
        (data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.0, 0.1, 0.5])), data.draw(st.integers(1, 4)))
        for _ in range(data.draw(st.integers(2, 4)))
    ]
    packed = data.draw(st.sampled_from([0, 40]))

    def jobs() -> list[Job]:
        return [
            Job(
                f"job{i}",
                LoraConfig(r=r, lora_dropout=p, target_modules=[QV, "all-linear", ["v_proj", "down_proj"]][i % 3]),
                Batches(rows, 1 if packed else size, max_steps=3, seed=i, packed=packed),
                1e-2,
                seed=i,
            )
            for i, (r, p, size) in enumerate(shapes)
        ]

    same(train_many(made(), jobs(), tokens=data.draw(st.sampled_from([60, 4096]))), made, jobs(), 1e-9, 1e-9)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 90)), min_size=1, max_size=7),
    st.sampled_from([50, 200, 1000]),
    st.sampled_from([0, 20, 500]),
)
def test_passes_compute_least(shapes, tokens: int, fixed: int) -> None:
    """Of all divisions of the parts by length; each part is in one pass, and a pass of several has its room."""
    parts = [SimpleNamespace(adapter=f"a{i}", shape=shape) for i, shape in enumerate(shapes)]
    cost = lambda group: fixed + sum(p.shape[0] for p in group) * max(p.shape[1] for p in group)
    allowed = lambda group: len(group) == 1 or cost(group) - fixed <= tokens
    found = passes(parts, tokens, fixed)
    assert sorted(p.adapter for group in found for p in group) == [p.adapter for p in parts]
    assert all(map(allowed, found))
    ordered, least = sorted(parts, key=lambda p: -p.shape[1]), []
    for cuts in itertools.product([False, True], repeat=len(parts) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(parts)]
        groups = [ordered[a:b] for a, b in itertools.pairwise([0, *ends])]
        least += [sum(map(cost, groups))] if all(map(allowed, groups)) else []
    assert sum(map(cost, found)) == min(least)


def test_several_processes_are_refused_before_anything_is_done(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="one process, and 2 were started"):
        train_many(None, [])


def test_in_single_precision_losses_are_those_of_running_alone(model_factory, rows) -> None:
    results = train_many(model_factory(), [job(name, rows) for name in KINDS])
    for name in KINDS:
        expected, _ = alone(model_factory(), job(name, rows))
        for (_, a), (_, b) in zip(results[name].losses, expected.losses, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert results[name].tokens == expected.tokens


def test_adapters_with_a_term_of_their_own(model_factory, rows) -> None:
    def jobs() -> list[Job]:
        config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=1, total_step=9, target_modules=QV)
        return [Job("ada", config, Batches(rows, 4, max_steps=9), 1e-2), job("small", rows)]

    made = lambda: model_factory().double()
    same(train_many(made(), jobs()), made, jobs(), 1e-9, 1e-9)


def test_one_that_diverges_leaves_the_others_as_they_are(model_factory, rows) -> None:
    made = lambda: model_factory().double()
    jobs = [job("small", rows), job("wide", rows, learning_rate=1e200, schedule="constant"), job("dora", rows)]
    results = train_many(made(), jobs)
    assert "at step" in results["wide"].stopped
    assert "learning rate" in results["wide"].stopped
    assert results["wide"].step < len(jobs[1].batches)
    same(results, made, [job("small", rows), job("dora", rows)], 1e-9, 1e-9)


class StopsAt(Event):
    def __init__(self, step: int) -> None:
        self.at, self.seen = step, [""]

    def step(self, run: Run) -> None:
        if run.step == self.at:
            run.stop = "enough"

    def end(self, run: Run) -> None:
        self.seen.append(f"end {run.step}")

    def close(self, run: Run) -> None:
        self.seen.append("close")


def test_a_job_ends_by_itself(model_factory, rows) -> None:
    made = lambda: model_factory().double()
    stops = StopsAt(4)
    results = train_many(made(), [job("small", rows, events=[stops]), job("wide", rows)])
    assert (results["small"].step, results["small"].stopped) == (4, "enough")
    assert stops.seen == ["", "end 4", "close"]
    assert results["wide"].step == 9
    same(results, made, [job("small", rows, events=[StopsAt(4)]), job("wide", rows)], 1e-9, 1e-9)


def test_evaluations_see_their_own_adapter(model_factory, rows) -> None:
    made = lambda: model_factory().double()

    def jobs() -> list[Job]:
        score = lambda model: {"loss": evaluate_loss(model, rows[:4]).loss}
        return [
            job(name, rows, events=[Evaluate(score, 2), EarlyStopping(patience)])
            for name, patience in (("small", 1), ("dora", 9), ("dropped", 9))
        ]

    results = train_many(made(), jobs())
    for one in jobs():
        expected, _ = alone(made(), one)
        assert results[one.name].stopped == expected.stopped
        for (step, ours), (other, theirs) in zip(results[one.name].scores, expected.scores, strict=True):
            assert step == other
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


def test_what_was_there_is_left_alone(model_factory, rows) -> None:
    base = model_factory().double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=QV, init_lora_weights=False), "mine").eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rounds: list[int] = []
    results = train_many(model, [job("small", rows), job("wide", rows)], events=[lambda live: rounds.append(len(live))])
    assert results.model is model
    assert not model.training
    assert model.active_adapters == ["mine"]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".mine." in n}
    assert rounds == [2] * 9 + [1] * 3  # 12 steps and 9
    again = train_many(model, [job("small", rows)])  # goes on from where it is
    assert again["small"].losses[0][1] < results["small"].losses[0][1]


def test_jobs_that_cannot_share_a_batch_are_refused_by_name(model_factory, rows) -> None:
    batches = Batches(rows)
    jobs = [
        job("small", rows),
        job("small", rows),
        Job("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), batches, 1e-3),
        Job("biased", LoraConfig(target_modules=QV, bias="all"), batches, 1e-3),
    ]
    with pytest.raises(ConfigError, match=r"called 'small'; 'prompt' is a prompt.*; 'biased' trains .*biases"):
        train_many(model_factory(), jobs)
    with pytest.raises(ConfigError, match="there are no jobs"):
        train_many(model_factory(), [])
