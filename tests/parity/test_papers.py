"""Where PEFT 0.21.2 computes another formula than a method's paper, we compute PEFT's: its files say nothing else.

Each test writes out both formulas, and holds for both libraries. docs/differences.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.models import batch, build
from tests.parity.pairs import BOTH, quiet, stir

both = pytest.mark.parametrize("library", BOTH, ids=lambda library: library.__name__)


def change(library: Any, kind: str, fan_in: int = 8, fan_out: int = 8, **fields: Any) -> tuple[Any, Tensor, Tensor]:
    """(the model, its one layer's weight W, that weight as adapted, W'), with a stirred adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(fan_in, fan_out, bias=False))
    model = quiet(library.get_peft_model, base, getattr(library, kind)(target_modules=["0"], **fields))
    stir(model)
    layer = model.get_base_model()[0]
    with torch.no_grad():
        return model, layer.base_layer.weight.clone(), model.eval()(torch.eye(fan_in)).T


def default(container: Any) -> Tensor:
    """The adapter's tensor."""
    return container["default"].detach()


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def far(found: Tensor, wanted: Tensor, least: float = 0.05) -> None:
    assert (found - wanted).norm() > least * wanted.norm()


@both
def test_c3a_divides_by_the_inputs(library: Any) -> None:
    model, W, adapted = change(library, "C3AConfig", block_size=4)
    c = default(model.get_base_model()[0].c3a_kernel)
    paper = torch.stack(
        [torch.stack([c[i // 4, j // 4, (j % 4 - i % 4) % 4] for j in range(8)]) for i in range(8)]
    )  # eq. 4
    near(adapted - W, paper / 8)


@both
def test_road_turns_outputs_that_are_half_a_group_apart(library: Any) -> None:
    model, W, adapted = change(library, "RoadConfig", variant="road_1", group_size=8)
    layer = model.get_base_model()[0]
    angle, size = default(layer.road_theta), default(layer.road_alpha)

    def turned(pairs: Callable[[int], tuple[int, int]]) -> Tensor:
        R = torch.zeros(8, 8)
        for i in range(4):
            a, b = pairs(i)
            R[a, a] = R[b, b] = size[i] * angle[i].cos()
            R[b, a] = size[i] * angle[i].sin()
            R[a, b] = -R[b, a]
        return R @ W

    near(adapted, turned(lambda i: (i, i + 4)))
    far(adapted, turned(lambda i: (2 * i, 2 * i + 1)))  # eq. 2


@both
def test_tinylora_has_the_root_of_the_singular_values_on_both_sides(library: Any) -> None:
    model, W, adapted = change(library, "TinyLoraConfig", fan_out=6, r=2, u=4)
    layer = model.get_base_model()[0]
    (v,) = (p for n, p in model.named_parameters() if "tinylora_v" in n)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    U, S, V = U[:, :2], S[:2], V[:2]
    signs = (default(layer.tinylora_A) * V).sum(1).sign()  # a solver's choice
    U, V = U * signs, V * signs[:, None]
    R = torch.einsum("u,uij->ij", v.detach(), default(layer.tinylora_P))
    near(adapted - W, U @ S.sqrt().diag() @ R @ S.sqrt().diag() @ V)
    far(adapted - W, U @ S.diag() @ R @ V)


@both
def test_delora_has_the_norm_of_each_column_and_starts_from_zero(library: Any) -> None:
    model, W, adapted = change(library, "DeloraConfig", fan_out=6, r=2)
    layer = model.get_base_model()[0]
    A, B, size = default(layer.delora_A), default(layer.delora_B), default(layer.delora_lambda)
    pair = size / 2 * (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True))
    near(adapted - W, pair * W.norm(dim=0))
    far(adapted - W, pair * W.norm())  # eq. 15
    config = library.DeloraConfig(target_modules=["0"])
    fresh = quiet(library.get_peft_model, nn.Sequential(nn.Linear(8, 6)), config)
    assert not default(fresh.get_base_model()[0].delora_B).any()  # eq. 9 starts at random, less a frozen copy


@both
def test_fourierft_has_the_scale_of_the_inverse_transform(library: Any) -> None:
    model, W, adapted = change(library, "FourierFTConfig", fan_out=6, n_frequency=5, scaling=150.0)
    F = torch.zeros(6, 8)
    at = torch.randperm(48, generator=torch.Generator().manual_seed(777))[:5]
    F[at // 8, at % 8] = default(model.get_base_model()[0].fourierft_spectrum)
    p, q = torch.arange(6.0)[:, None], torch.arange(8.0)[None]
    paper = sum(
        F[j, k] * torch.cos(2 * torch.pi * (p * j / 6 + q * k / 8)) for j in range(6) for k in range(8)
    )  # the real part of eq. 3
    near(adapted - W, 150.0 * paper / 48)


@both
def test_boft_scales_the_outputs(library: Any) -> None:
    model, W, adapted = change(library, "BOFTConfig", boft_block_size=4)
    s = default(model.get_base_model()[0].boft_s).flatten()
    far(s, torch.ones(8))
    near((adapted / s[:, None]).norm(dim=1), W.norm(dim=1))  # without s it is a rotation, as in section 4


@both
def test_supertuning_asks_no_data(library: Any) -> None:
    model, W, _ = change(library, "SupertuningConfig", sparsity=0.75)
    at = model.get_base_model()[0].supertuning_indices["default"].long()
    assert set(at.tolist()) == set(W.abs().flatten().topk(16).indices.tolist())


@both
def test_adalora_adds_norms_without_squares_and_their_mean(library: Any) -> None:
    losses, terms = [], []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        config = library.AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=3, total_step=10, orth_reg_weight=weight
        )
        model = quiet(library.get_peft_model, build("llama"), config).train()
        stir(model)
        x = batch("llama")["input_ids"]
        losses.append(model(input_ids=x, labels=x).loss.item())
        for name, P in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                terms.append((P @ P.T if "lora_A" in name else P.T @ P) - torch.eye(3))
    norms = torch.stack([term.norm() for term in terms[len(terms) // 2 :]])
    added = torch.tensor(losses[1] - losses[0])
    near(added, 0.5 * norms.mean())
    far(added, 0.5 * norms.square().sum())  # eq. 4


@both
def test_the_gate_of_an_adaption_prompt_is_taken_as_it_is(library: Any) -> None:
    torch.manual_seed(0)
    config = library.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    model = quiet(library.get_peft_model, build("llama"), config).eval()
    attention = model.get_base_model().model.layers[-1].self_attn
    (gate,) = (p for n, p in attention.named_parameters() if "adaption_gate" in n)
    assert gate.shape == (1,)  # the paper has one for each of the two heads
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda _m, _x, y: outputs.append(y[0].detach()))
    with torch.no_grad():
        for value in (0.0, 1.0, 2.0):
            gate.fill_(value)
            model(**batch("llama"))
    near(outputs[2] - outputs[0], 2 * (outputs[1] - outputs[0]))  # eq. 7: tanh(2) / tanh(1) = 1.27
