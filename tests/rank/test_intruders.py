"""Intruder dimensions: found by their definition, scaled by the paper's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.models import AttentionNet, ConvNet, assert_untouched, mixtral, snapshot, tokens, toy
from tests.rank.adapters import dense, loaded, lora, saved
from tests.rank.test_adapter_file import EXPERTS
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.rank.changes import changes
from trimtab.rank.intruders import find_intruders, mend_adapter, reduce_intruder_dimension

LAYERS = ["embed", "up", "down", "head", "conv"]


def planted(W: torch.Tensor, size: float = 50.0) -> torch.Tensor:
    """W with a strong direction that lies between all of its own."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return W + size * torch.outer(U.sum(1), Vh.sum(0)) / U.shape[1]


def test_the_definition_in_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(12, 9, generator=draw)
    adapted = W + 3 * torch.randn(12, 2, generator=draw) @ torch.randn(2, 9, generator=draw)
    base, new = torch.linalg.svd(W).U[:, :9], torch.linalg.svd(adapted).U
    for epsilon in (0.0, 0.5, 0.8, 1.0):
        wanted = [max(abs(float(base[:, i] @ new[:, j])) for i in range(9)) < epsilon for j in range(5)]
        assert find_intruders(W, adapted, top_k=5, epsilon=epsilon).tolist() == wanted


def test_a_planted_intruder_is_found_and_nothing_else() -> None:
    W = torch.randn(40, 30)
    assert not find_intruders(W, W).any()
    assert find_intruders(W, planted(W), epsilon=0.4).tolist() == [True] + [False] * 9
    assert find_intruders(W, 3 * W, top_k=99).shape == (30,)


def test_stacks_are_looked_at_one_by_one() -> None:
    W = torch.randn(3, 30, 20)
    adapted = W.clone()
    adapted[1] = planted(W[1])
    assert find_intruders(W, adapted, 4, 0.4).tolist() == [[False] * 4, [True, False, False, False], [False] * 4]


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_each_is_scaled_by_the_papers_formula(keep: float) -> None:
    model = lora(r=3, target_modules=LAYERS)
    old = dense(model)
    W = {c.path: c.base() for c in changes(model, "default")}
    report = reduce_intruder_dimension(model, top_k=4, threshold_epsilon=0.8, mitigation_lambda=keep, logging_sink=None)
    assert model.active_adapters == ["intruder_reduced"]
    assert sum(x.intruders for x in report) > 0
    new = dense(model, "intruder_reduced")
    for layer in report:
        D = old[layer.path]
        U, S, Vh = torch.linalg.svd(W[layer.path] + D, full_matrices=False)
        found = find_intruders(W[layer.path], W[layer.path] + D, 4, 0.8)
        assert layer.intruders == int(found.sum())
        for j in found.nonzero().flatten():
            D = D - (1 - keep) * S[j] * torch.outer(U[:, j], Vh[j])
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        D = (U[:, :3] * S[:3]) @ Vh[:3]  # the rank stays
        assert (new[layer.path] - D).norm() < 1e-4 * old[layer.path].norm(), layer
        moved = (D - old[layer.path]).norm() / old[layer.path].norm()
        assert layer.moved == pytest.approx(float(moved), abs=1e-4)
    assert all(torch.equal(D, old[p]) for p, D in dense(model).items())


def test_layers_without_any_are_copied_bit_by_bit() -> None:
    model = lora(r=3, target_modules=LAYERS)
    said: list[str] = []
    report = reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=said.append)
    assert [(x.intruders, x.moved) for x in report] == [(0, 0.0)] * len(LAYERS)
    assert len(said) == len(LAYERS)
    before = {n: p for n, p in model.named_parameters() if ".default." in n or n.endswith(".default")}
    assert before
    for name, parameter in before.items():
        twin = model.get_parameter(name.replace("default", "intruder_reduced"))
        assert torch.equal(parameter, twin)


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (mixtral, {**EXPERTS, "rank_pattern": {"experts.gate_up_proj": 6}}),
        (lambda: ConvNet(groups=2), {"target_modules": ["one", "two"]}),
        (AttentionNet, {"target_modules": ["self_attn"]}),
        (toy, {"target_modules": ["up"], "trainable_token_indices": {"embed": [1]}, "modules_to_save": ["head"]}),
    ],
    ids=["experts", "groups", "attention", "tokens and head"],
)
def test_every_layer_of_a_lora(base: Any, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = lora(base(), **{"r": 4, **fields})
    report = reduce_intruder_dimension(model, top_k=3, threshold_epsilon=1.0, mitigation_lambda=0.5, logging_sink=None)
    assert all(x.intruders for x in report)
    assert all(0 < x.moved < 1 for x in report)
    old, new = dense(model), dense(model, "intruder_reduced")
    for layer in report:
        moved = (new[layer.path] - old[layer.path]).norm() / old[layer.path].norm()
        assert float(moved) == pytest.approx(layer.moved, abs=1e-4)


def test_an_adapter_on_disk_is_mended(tmp_path: Path) -> None:
    base = toy()
    before = snapshot(base)
    scored = []

    def score(folder: Any) -> float:
        scored.append(str(folder))
        return len(scored)

    done = mend_adapter(saved(tmp_path, target_modules=LAYERS), base, tmp_path / "new", 4, 0.8, 0.5, score)
    assert_untouched(base, before)
    assert scored == [str(tmp_path), str(tmp_path / "new")]
    assert (done.old_score, done.score, done.output) == (1, 2, str(tmp_path / "new"))
    assert done.intruders == sum(x.intruders for x in done.layers) > 0
    model = loaded(tmp_path)
    reduce_intruder_dimension(model, "default", "mended", 4, 0.8, 0.5, None)
    assert torch.allclose(loaded(tmp_path / "new")(tokens()), model(tokens()), atol=1e-6)
    assert not torch.allclose(loaded(tmp_path)(tokens()), model(tokens()), atol=1e-3)


def test_what_cannot_be_mended() -> None:
    for config, message in (
        (trimtab.LoHaConfig(target_modules=["up"]), "LOHA"),
        (trimtab.LoraConfig(target_modules=["up"], use_dora=True), "DoRA"),
        (trimtab.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"), "pissa"),
    ):
        with pytest.raises((AdapterFileError, ConfigError), match=message):
            reduce_intruder_dimension(trimtab.get_peft_model(toy(), config))
    with pytest.raises(ConfigError, match="top_k"):
        find_intruders(torch.ones(2, 2), torch.ones(2, 2), top_k=0)
    with pytest.raises(ConfigError, match="epsilon"):
        find_intruders(torch.ones(2, 2), torch.ones(2, 2), epsilon=2)
