"""Bases in bf16 and fp16: as close to a reference in fp64 as PEFT, over several draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.models import batch, build, tensor_of
from tests.parity.pairs import BOTH, adapt, near, pair, parameters, quiet, stir

DRAWS = 6
MARGIN = 1.1

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": "all-linear", "lora_alpha": 16}),
    "conv1d": ("gpt2", {"target_modules": "all-linear", "lora_alpha": 16}),
    "embedding": ("toy", {"target_modules": ["embed"], "lora_alpha": 16}),
    "biases": ("toy", {"target_modules": ["biased", "conv"], "lora_bias": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora_conv1d": ("gpt2", {"target_modules": "all-linear", "use_dora": True}),
    "dora_embedding": ("toy", {"target_modules": ["embed"], "use_dora": True}),
    "tokens": ("llama", {"trainable_token_indices": [3, 4, 5, 6, 7, 8]}),
}
each = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The adapted layers by path."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "scaling")}


def inputs_of(layer: torch.nn.Module, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random inputs for one layer."""
    base = layer.base_layer
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(1, base.num_embeddings, (8, 5), generator=draw)
    width = base.in_features if hasattr(base, "in_features") else base.weight.shape[0]
    return torch.randn(8, 5, width, generator=draw).to(dtype)


def error(out: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to the reference."""
    return ((out.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@halves
@each
def test_layers(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """One layer's output and input gradient: the error against fp64 is PEFT's at most."""
    ours, theirs = (m.eval() for m in pair(name, fields, dtype))
    exact = pair(name, fields, dtype)[0].double().eval()
    mine, other, reference = layers_of(ours), layers_of(theirs), layers_of(exact)
    errors: dict[str, list[float]] = {"ours": [], "theirs": [], "our gradient": [], "their gradient": []}
    draw = torch.Generator().manual_seed(0)
    for path in list(other)[:8]:
        for _ in range(DRAWS):
            x = inputs_of(other[path], draw, dtype)
            results = []
            for layer, kind in ((mine[path], dtype), (other[path], dtype), (reference[path], torch.float64)):
                mine_x = x.detach().to(kind).requires_grad_() if x.is_floating_point() else x
                y = layer(mine_x)
                assert y.dtype == kind
                if x.is_floating_point():
                    y.double().square().sum().backward()
                results.append((y.detach(), mine_x.grad))
            (a, da), (b, db), (c, dc) = results
            errors["ours"].append(error(a, c))
            errors["theirs"].append(error(b, c))
            if da is not None:
                errors["our gradient"].append(error(da, dc))
                errors["their gradient"].append(error(db, dc))
    means = {k: sum(v) / len(v) for k, v in errors.items() if v}
    if "ours" in means:
        assert means["ours"] <= MARGIN * means["theirs"], means
    if "our gradient" in means:
        assert means["our gradient"] <= MARGIN * means["their gradient"], means


@halves
@each
def test_models(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """The whole model: logits and the adapter's gradients, the mean over draws of the adapter."""
    outs: list[tuple[float, float]] = []
    gradients: list[tuple[float, float]] = []
    for seed in range(DRAWS):
        models = [*pair(name, fields, dtype), pair(name, fields, dtype)[0]]
        for model in models:
            stir(model, 0.1 * (seed + 1))
        models[2].double()
        results = []
        for model in models:
            out = tensor_of(model.eval()(**batch(name)))
            out.double().square().mean().backward()
            results.append((out.detach(), {n: p.grad for n, p in parameters(model).items() if p.grad is not None}))
        (a, da), (b, db), (c, dc) = results
        assert a.dtype == b.dtype
        outs.append((error(a, c), error(b, c)))
        gradients += [(error(da[n], g), error(db[n], g)) for n, g in dc.items() if g.abs().max() > 1e-12]
    for pairs in (outs, gradients):
        mine, other = (torch.tensor(side).mean().item() for side in zip(*pairs, strict=True))
        assert mine <= MARGIN * other


@halves
@pytest.mark.parametrize("autocast", [True, False])
@each
def test_formats(name: str, fields: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    """Parameters have the number formats that PEFT gives them."""
    ours, theirs = (adapt(library, name, fields, dtype, autocast_adapter_dtype=autocast) for library in BOTH)
    mine, other = parameters(ours), parameters(theirs)
    assert {n: p.dtype for n, p in mine.items()} == {n: p.dtype for n, p in other.items()}


@halves
@each
def test_merge(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Merged weights are the exact ones, rounded once; PEFT's are no closer."""
    ours, theirs = pair(name, fields, dtype)
    exact = pair(name, fields, dtype)[0].double()
    mine, other, reference = (parameters(quiet(m.eval().merge_and_unload)) for m in (ours, theirs, exact))
    for key, weight in reference.items():
        assert mine[key].dtype == dtype
        assert error(mine[key], weight) <= MARGIN * error(other[key], weight) + 1e-12, key
        near(mine[key].double(), weight.to(dtype).double(), 1e-3)


@halves
def test_unmerge_is_exact(dtype: torch.dtype) -> None:
    """After merge and unmerge the base has the very bits it had (PEFT's has not: its defect D2-12)."""
    before = build("llama", dtype).state_dict()
    changed = []
    for library in BOTH:
        model = adapt(library, "llama", {"target_modules": "all-linear"}, dtype)
        stir(model)
        quiet(model.merge_adapter)
        quiet(model.unmerge_adapter)
        after = model.unload().state_dict()
        changed.append(sum((after[k] != v).sum().item() for k, v in before.items()))
    assert changed[0] == 0 < changed[1]


@halves
@pytest.mark.parametrize("low", [False, True], ids=["whole", "meta"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}])
def test_adapters_put_in_by_themselves_have_their_layers_dtype(
    dtype: torch.dtype, low: bool, fields: dict[str, Any]
) -> None:
    """`get_peft_model` keeps them in fp32; `inject_adapter_in_model`, which diffusers and transformers call, does not."""
    found: list[tuple[dict[str, torch.dtype], ...]] = []
    for library in BOTH:
        config = library.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], **fields)
        injected = quiet(library.inject_adapter_in_model, config, build("llama", dtype), low_cpu_mem_usage=low)
        wrapped = quiet(library.get_peft_model, build("llama", dtype), config, low_cpu_mem_usage=low)
        found.append(tuple({n: p.dtype for n, p in parameters(m).items()} for m in (injected, wrapped)))
    assert found[0] == found[1]
