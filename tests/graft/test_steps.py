"""Steps told by torch's hooks: AdaLoRA's ranks fall in any loop, the caller comes first, and all of it is resumed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import llama, tokens
from trimtab import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from trimtab.errors import PeftWarning

SCHEDULE: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12,
    "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False,
}  # fmt: skip


def adapted(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(llama(), AdaLoraConfig(**{**SCHEDULE, **fields})).train()


def optimiser_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model: Any, optimiser: torch.optim.Optimizer, first: int, last: int, by_hand: Any = None) -> None:
    for t in range(first, last + 1):
        x = tokens(vocabulary=64, seed=t)
        model(input_ids=x, labels=x).loss.backward()
        optimiser.step()
        if by_hand is not None:
            by_hand(model, t)
        optimiser.zero_grad()


def state_of(model: Any) -> dict[str, Any]:
    adapter = model.graft.adapters["default"]
    tensors = {f"{m.site.name}.{leaf}": m.tensor(leaf) for m in adapter.methods for leaf in m.declared}
    return {**tensors, "pattern": adapter.config.rank_pattern}


def same(a: Any, b: Any) -> None:
    assert a["pattern"] == b["pattern"]
    for key, value in a.items():
        if key != "pattern":
            assert torch.equal(value, b[key]), key


def kept(model: Any) -> int:
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


def test_a_plain_loop_prunes_with_nobody_calling_anything() -> None:
    model = adapted()
    train(model, optimiser_of(model), 1, 12)
    assert kept(model) == 2 * len(model.peft_config["default"].rank_pattern)
    by_hand = adapted()
    train(by_hand, optimiser_of(by_hand), 1, 12, lambda m, t: m.update_and_allocate(t))
    same(state_of(model), state_of(by_hand))


@pytest.mark.parametrize("first", [0, 1, 3], ids=["counted from 0", "from 1", "from 3"])
def test_the_caller_comes_first(first: int) -> None:
    """As if there were no hooks: the same steps by the method's own `step` alone."""
    model, twin = adapted(), adapted()
    train(model, optimiser_of(model), 1, 9, lambda m, t: m.update_and_allocate(t - 1 + first))
    twin.graft.adapters["default"].by_hand = True

    def alone(m: Any, t: int) -> None:
        adapter = m.graft.adapters["default"]
        adapter.method.step(adapter.methods, adapter.config, t - 1 + first)

    train(twin, optimiser_of(twin), 1, 9, alone)
    same(state_of(model), state_of(twin))


def test_only_optimisers_that_hold_the_adapter_count() -> None:
    model = adapted()
    other = torch.nn.Linear(3, 3)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(20):
        other(torch.ones(3)).sum().backward()
        stranger.step()
    assert model.graft.adapters["default"].t == 0
    optimiser = optimiser_of(model)
    optimiser.step()
    assert model.graft.adapters["default"].t == 0, "without gradients there was no step"
    train(model, optimiser, 1, 3)
    assert model.graft.adapters["default"].t == 3


def test_each_of_two_adapters_counts_its_own_steps() -> None:
    model = adapted()
    model.add_adapter("second", AdaLoraConfig(**SCHEDULE))
    train(model, optimiser_of(model), 1, 3)
    model.set_adapter("second")
    train(model.train(), optimiser_of(model), 1, 5)
    assert [a.t for a in model.graft.adapters.values()] == [3, 5]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_counts_by_itself(duplicate: Callable[[Any], Any]) -> None:
    model = adapted()
    train(model, optimiser_of(model), 1, 3)
    twin = duplicate(model)
    train(twin, optimiser_of(twin), 4, 12)
    assert [m.graft.adapters["default"].t for m in (model, twin)] == [3, 12]
    assert kept(twin) == 2 * len(twin.peft_config["default"].rank_pattern)


# ---------------------------------------------------------------------- save and resume
@pytest.mark.parametrize("middle", [3, 6, 10])
@pytest.mark.parametrize("how", ["into the same model", "into a new one", "from_pretrained"])
def test_training_goes_on_where_it_was_saved(how: str, middle: int, tmp_path: Path) -> None:
    whole = adapted()
    optimiser = optimiser_of(whole)
    train(whole, optimiser, 1, middle)
    whole.save_pretrained(tmp_path)
    steps_of = copy.deepcopy(optimiser.state_dict())
    train(whole, optimiser, middle + 1, 14)
    if how == "from_pretrained":
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    else:
        again = adapted() if how == "into a new one" else copy.deepcopy(whole)
        again.load_adapter(tmp_path, "default", is_trainable=True)
        again.train()
    new = optimiser_of(again)
    new.load_state_dict(steps_of)
    train(again, new, middle + 1, 14)
    same(state_of(again), state_of(whole))


def test_the_state_is_of_the_adapters_own_save(tmp_path: Path) -> None:
    model = adapted()
    train(model, optimiser_of(model), 1, 6)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "training_state.safetensors").is_file()
    state = (tmp_path / "training_state.safetensors").read_bytes()
    plain = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "training_state.safetensors").exists(), "a save leaves nothing of another one"
    other = adapted()
    train(other, optimiser_of(other), 1, 4)
    other.save_pretrained(tmp_path)
    (tmp_path / "training_state.safetensors").write_bytes(state)
    with pytest.warns(PeftWarning, match="not of the same save"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ids = tokens(vocabulary=64)
    assert torch.equal(loaded.eval()(ids).logits, other.eval()(ids).logits)


def test_for_inference_the_state_is_left_alone(tmp_path: Path) -> None:
    model = adapted()
    train(model, optimiser_of(model), 1, 10)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    ids = tokens(vocabulary=64)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert sum(len(m.lora_E) for m in loaded.graft.adapters["default"].methods) == kept(model)
