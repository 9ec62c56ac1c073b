"""Several methods on one model: side by side, stacked, in mixed batches, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contract.cases import move
from tests.models import assert_untouched, llama, snapshot, tokens
from trimtab import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)

CONFIGS: dict[str, PeftConfig] = {
    "my_lora": LoraConfig(target_modules=["q_proj"], r=3),
    "my_ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "my_oft": OFTConfig(target_modules=["o_proj"], oft_block_size=4),
    "my_loha": LoHaConfig(target_modules=["q_proj", "down_proj"], r=2),
    "my_norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "my_vera": VeraConfig(target_modules=["q_proj", "v_proj"], r=5),
    "my_adalora": AdaLoraConfig(target_modules=["gate_proj", "o_proj"], init_r=3, total_step=10),
}
ALL = list(CONFIGS)


def ids() -> Tensor:
    return tokens(vocabulary=64)


def near(a: Tensor, b: Tensor) -> None:
    assert float((a - b).detach().abs().max()) < 1e-5


@pytest.fixture
def model() -> PeftModel:
    base = llama()
    first, *others = CONFIGS.items()
    peft = get_peft_model(base, first[1], first[0])
    for name, config in others:
        peft.add_adapter(name, config)
    for name in peft.peft_config:
        move(peft, name)
    return peft.eval()


def test_each_by_itself_is_as_if_alone(model: PeftModel) -> None:
    for name in ALL:
        alone = get_peft_model(llama(), model.peft_config[name], name)
        with torch.no_grad():
            held = dict(alone.named_parameters())
            for key, tensor in model.named_parameters():
                if f".{name}" in key:
                    held[key].copy_(tensor)
        model.set_adapter(name)
        near(model(ids()).logits, alone.eval()(ids()).logits)


def test_all_together_equal_merged(model: PeftModel) -> None:
    base = llama()(ids()).logits
    model.set_adapter(ALL)
    y = model(ids()).logits
    assert float((y - base).detach().abs().max()) > 1e-2
    model.merge_adapter(ALL)
    near(model(ids()).logits, y)
    model.unmerge_adapter()
    assert torch.equal(model(ids()).logits, y)
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, base)


def test_all_train_together(model: PeftModel) -> None:
    model.set_adapter(ALL)
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    for name in ALL:
        own = [p for n, p in model.named_parameters() if f".{name}" in n]
        assert own
        assert all(p.grad is not None for p in own)


def test_every_row_its_own_method(model: PeftModel) -> None:
    names = [*ALL, "__base__"]
    x = tokens(rows=len(names), vocabulary=64)
    with torch.no_grad():
        mixed = model(x, adapter_names=names).logits
        for row, name in enumerate(names[:-1]):
            model.set_adapter(name)
            near(mixed[row : row + 1], model(x[row : row + 1]).logits)
        near(mixed[-1:], llama()(x[-1:]).logits)


def test_saved_and_loaded(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / ALL[0], ALL[0])
    for name in ALL[1:]:
        loaded.load_adapter(tmp_path / name, name)
    for some in ([n] for n in ALL):
        for m in (model, loaded):
            m.set_adapter(some)
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    for m in (model, loaded):
        m.set_adapter(ALL)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_taken_out_again() -> None:
    base = llama()
    before = snapshot(base)
    peft = get_peft_model(base, CONFIGS[ALL[0]], ALL[0])
    for name in ALL[1:]:
        peft.add_adapter(name, CONFIGS[name])
    for name in ("my_oft", "my_vera", "my_norms"):
        peft.delete_adapter(name)
    peft.unload().requires_grad_(True)
    assert_untouched(base, before)
