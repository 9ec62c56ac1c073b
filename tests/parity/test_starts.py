"""Initial tensors follow PEFT's distributions, or satisfy the same identities exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.pairs import BOTH, adapt, near, parameters, quiet, run

DRAWS = 40


class Wide(nn.Module):
    """Layers wide enough for statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 64)
        self.embed = nn.Embedding(80, 48)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


def draws(library: Any, start: Any, r: int, **more: Any) -> dict[str, Tensor]:
    """Many starts of the same adapter: {tensor: (draws, ...)}."""
    found: dict[str, list[Tensor]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(1000 + seed)
        config = library.LoraConfig(r=r, target_modules=["linear", "embed"], init_lora_weights=start, **more)
        model = quiet(library.get_peft_model, Wide(), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(name, []).append(parameter.detach().clone())
    return {k: torch.stack(v) for k, v in found.items()}


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("r", [4, 16])
def test_distributions(start: Any, r: int, more: dict[str, Any]) -> None:
    """Mean, spread, support and tails of every tensor."""
    if "lora_bias" in more and isinstance(start, str):  # refused by both
        for library in BOTH:
            with pytest.raises(ValueError, match="only supported with init_lora_weights"):
                library.LoraConfig(lora_bias=True, init_lora_weights=start)
        return
    if "lora_bias" in more:
        more = {**more, "exclude_modules": ["embed"]}
    ours, theirs = (draws(library, start, r, **more) for library in BOTH)
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.shape == other.shape
        size = other.numel()
        spread = other.std().item()
        noise = 6 * max(spread, 1e-12) / size**0.5
        assert abs((mine.mean() - other.mean()).item()) <= 2 * noise, name
        assert abs(mine.std().item() - spread) <= 0.02 * spread + 2 * noise, name
        assert abs((mine.abs().max() - other.abs().max()).item()) <= 0.25 * other.abs().max().item() + 1e-12, name
        for q in (0.1, 0.5, 0.9):
            a, b = (t.flatten()[:100_000].quantile(q).item() for t in (mine, other))
            assert abs(a - b) <= 0.03 * max(spread, 1e-12) + 4 * noise, (name, q)


IDENTITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"target_modules": "all-linear"}),
    "embedding": ("toy", {"target_modules": ["embed", "conv"]}),
    "gaussian": ("gpt2", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "r": 4}),
    "orthogonal_conv1d": ("gpt2", {"init_lora_weights": "orthogonal", "r": 4}),
    "dora": ("llama", {"use_dora": True}),
    "dora_gpt2": ("gpt2", {"use_dora": True, "target_modules": "all-linear"}),
    "dora_embedding": ("toy", {"use_dora": True, "target_modules": ["embed"]}),
    "pissa": ("llama", {"init_lora_weights": "pissa", "r": 4}),
    "pissa_gpt2": ("gpt2", {"init_lora_weights": "pissa", "r": 4}),
    "pissa_niter": ("llama", {"init_lora_weights": "pissa_niter_8", "r": 4}),
    "olora": ("llama", {"init_lora_weights": "olora", "r": 4}),
    "tokens": ("llama", {"trainable_token_indices": [3, 4, 5]}),
}


@pytest.mark.parametrize(("name", "fields"), IDENTITIES.values(), ids=IDENTITIES)
def test_identity(name: str, fields: dict[str, Any]) -> None:
    """A fresh adapter leaves the output as it is, in both libraries."""
    from tests.parity.models import build

    base = run(build(name).eval(), name)
    for library in BOTH:
        model = adapt(library, name, fields).eval()
        near(run(model, name), base, 2e-5)


@pytest.mark.parametrize(
    ("name", "start", "r"),
    [
        ("llama", "pissa", 4),
        ("gpt2", "pissa", 4),
        ("llama", "pissa_niter_300", 4),
        ("llama", "olora", 3),
        ("bert", "olora", 8),
    ],
)
@pytest.mark.parametrize(
    "more", [{}, {"lora_alpha": 3}, {"use_rslora": True, "lora_alpha": 5}], ids=["1", "alpha", "rslora"]
)
def test_mutating_starts(name: str, start: str, r: int, more: dict[str, Any]) -> None:
    """PiSSA's and OLoRA's products and what they leave of the base are PEFT's."""
    ours, theirs = (adapt(library, name, {"init_lora_weights": start, "r": r, **more}) for library in BOTH)
    mine, other = parameters(ours), parameters(theirs)
    loose = 6e-3 if "niter" in start else 2e-5
    for key, tensor in other.items():
        if key.endswith("base_layer.weight"):
            near(mine[key], tensor, loose)
            path = key.removesuffix("base_layer.weight")
            A, B = f"{path}lora_A.default.weight", f"{path}lora_B.default.weight"
            near(mine[B] @ mine[A], other[B] @ other[A], loose)
            assert torch.linalg.matrix_rank(mine[A]) == r


def test_pissa_of_half() -> None:
    """From a bf16 base too, the pair and the rest add up to the base, to bf16's precision."""
    from tests.parity.models import build

    for start in ("pissa", "olora"):
        for library in BOTH:
            model = adapt(library, "llama", {"init_lora_weights": start, "r": 4}, torch.bfloat16)
            merged = parameters(quiet(model.merge_and_unload))
            for key, weight in build("llama", torch.bfloat16).named_parameters():
                near(merged[key].float(), weight.float(), 1.5e-2)
