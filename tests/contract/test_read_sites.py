"""The contract at layers that are read rather than called (attention, stacks of experts) and at quantised ones.

The rows are the cases of tests/contract/cases.py whose method has the kind; the layers are those of a net of their own.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.cases import CASES, DTYPES, Case, close, differs, move, tensors
from tests.models import assert_untouched, snapshot
from tests.quantised import FORMATS, net
from tests.quantised import inputs as quantised_inputs
from trimtab import PeftModel, get_peft_model
from trimtab.methods import config_class

WIDTH, HEADS, EXPERTS = 8, 2, 3


class Experts(nn.Module):
    """A stack of linear maps in one parameter (experts, out, in), as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH + 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,eod->bto", torch.nn.functional.pad(x, (0, 2), value=0.5), self.down_proj)


class Net(nn.Module):
    """An attention and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attention(x, x, x, need_weights=False)[0]
        return y + self.experts(y)


def made(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    # Frozen, so that attention takes the same way through the code before, with and after an adapter.
    return Net().to(dtype).requires_grad_(False).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


SITES = {"attention": {"target_modules": ["attention"]}, "parameter": {"target_parameters": ["experts.down_proj"]}}
PAIRS = [
    pytest.param(case, kind, id=f"{case.name}-{kind}")
    for case in CASES
    for kind in SITES
    if kind in case.method.kinds
    and case.name in ("lora", "lora-rslora", "lora-random", "lora-gaussian", "lora-pissa", "dora")
    and not (kind == "attention" and case.options.get("use_dora"))
]
everywhere = pytest.mark.parametrize(("case", "kind"), PAIRS)
formats = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def config(case: Case, kind: str) -> Any:
    return config_class(case.peft_type)(**{**case.options, **SITES[kind]})


def adapted(case: Case, kind: str, dtype: torch.dtype = torch.float32, moved: bool = True) -> PeftModel:
    model = get_peft_model(made(dtype), config(case, kind)).eval()
    if moved:
        move(model, "default")
    return model


@everywhere
@formats
def test_start_merge_unmerge_and_disable(case: Case, kind: str, dtype: torch.dtype) -> None:
    x, base = inputs(dtype), made(dtype)(inputs(dtype))
    fresh = adapted(case, kind, dtype, moved=False)(x)
    if case.identity:
        close(fresh, base, dtype)
    model = adapted(case, kind, dtype)
    expected = model(x)
    assert expected.dtype == dtype
    assert differs(expected.float(), base.float())
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.merge_adapter()
    close(model(x), expected, dtype)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


@everywhere
def test_two_stacked_equal_merged(case: Case, kind: str) -> None:
    if case.mutates:
        case = CASES[0]
    model = adapted(case, kind, torch.float64)
    model.add_adapter("second", config(case, kind))
    model.eval()
    move(model, "second")
    model.set_adapter(["default", "second"])
    x = inputs(torch.float64)
    stacked = model(x)
    model.merge_adapter(["default", "second"])
    close(model(x), stacked, torch.float64)
    model.unmerge_adapter()
    assert torch.equal(model(x), stacked)


@everywhere
def test_files_gradients_copies_and_coming_back(case: Case, kind: str, tmp_path: Path) -> None:
    model, x = adapted(case, kind), inputs()
    expected = model(x)
    model.save_pretrained(tmp_path)
    # Not to the bit: with nothing to train, attention takes its fast way.
    close(PeftModel.from_pretrained(made(), tmp_path)(x), expected, torch.float32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    model(x).square().sum().backward()
    trained = tensors(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    base = made()
    plain, before = base(x), snapshot(base)
    other = get_peft_model(base, config(case, kind)).eval()
    move(other, "default")
    assert other.unload(pristine=True) is base
    assert_untouched(base, before)
    assert torch.equal(base(x), plain)


@pytest.mark.parametrize("case", [c.values[0] for c in PAIRS if c.values[1] == "attention"], ids=lambda c: c.name)
def test_mixed_rows_of_an_attention_equal_each_alone(case: Case) -> None:
    model, x = adapted(case, "attention"), inputs()
    alone, base = model(x), made()(x)
    mixed = model(x, adapter_names=["default", "__base__", "default", "__base__"])
    close(mixed[[0, 2]], alone[[0, 2]], torch.float32)
    close(mixed[[1, 3]], base[[1, 3]], torch.float32)


# ---------------------------------------------------------------------- quantised layers
WHOLE = ("TRAINABLE_TOKENS", "LN_TUNING")  # methods that replace weights rather than add to them
LINEAR = [
    case
    for case in CASES
    if "linear" in case.method.kinds and not case.mutates and case.peft_type not in WHOLE
    and not case.options.get("trainable_token_indices") and not case.options.get("alora_invocation_tokens")  # no tokens
]  # fmt: skip


@pytest.mark.parametrize("name", ["bnb-nf4", "torchao-int8"])
@pytest.mark.parametrize("case", LINEAR, ids=lambda c: c.name)
def test_every_method_on_a_quantised_layer(case: Case, name: str, tmp_path: Path) -> None:
    assert name in FORMATS
    fields = {**case.options, "target_modules": ["up"]} | (
        {"feedforward_modules": []} if "feedforward_modules" in case.options else {}
    )
    settings = config_class(case.peft_type)(**fields)
    # In training mode: in evaluation, bitsandbytes' own 4-bit layer rounds to bf16 on processors with AVX512-BF16.
    x, base = quantised_inputs(), net(name)(quantised_inputs())
    model = get_peft_model(net(name), settings).eval()
    if case.identity:
        close(model(x), base, torch.float32)
    move(model, "default")
    expected = model(x)
    assert differs(expected, base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    if case.method.mergeable:
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(name).eval(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)  # they lie otherwise in memory
    model.train()(x).square().sum().backward()
    assert all((p.grad is not None) == (n in tensors(model)) for n, p in model.named_parameters())
