"""`add_weighted_adapter` against PEFT: the same deltas for every type; the differences that are meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.models import tokens, toy

LAYERS = ["embed", "up", "down", "head"]
NAMES = ["a", "b", "c"]
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name", "ignore:fan_in_fan_out", "ignore:The density")
TYPES = """svd linear cat ties ties_svd dare_linear dare_ties dare_linear_svd dare_ties_svd magnitude_prune
           magnitude_prune_svd""".split()


def build(library: Any, configs: dict[str, dict[str, Any]]) -> Any:
    """The toy with an adapter for each config; both libraries get the same numbers."""
    shared = {"r": 3, "lora_alpha": 6, "target_modules": LAYERS}
    made = {n: library.LoraConfig(**{**shared, **c}) for n, c in configs.items()}
    (first, config), *more = made.items()
    model = library.get_peft_model(toy(), config, first)
    for name, config in more:
        model.add_adapter(name, config)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw)
    return model.eval()


def both(configs: dict[str, dict[str, Any]], weights: list[float], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(ours, theirs) after the same call."""
    models = build(trimtab, configs), build(peft, configs)
    for model in models:
        model.add_weighted_adapter(list(configs), weights, "new", *args, **kwargs)
    return models


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """{layer: the change of its weight} by the new adapter."""
    found = ((n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and "new" in m.scaling)
    return {n: m.get_delta_weight("new").detach() for n, m in found}


def config(model: Any) -> dict[str, Any]:
    """The new adapter's config, but for what is only in memory."""
    return {k: v for k, v in model.peft_config["new"].to_dict().items() if k not in ("peft_version", "runtime_config")}


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-5) -> None:
    """The same deltas, relative to their size, and the same outputs."""
    mine, other = deltas(ours), deltas(theirs)
    assert mine.keys() == other.keys()
    assert mine
    for path, delta in other.items():
        assert (mine[path] - delta).abs().max() <= tolerance * max(1.0, delta.abs().max()), path


def striped(x: Tensor) -> Tensor:
    """In place of `torch.bernoulli`: a mask that a transposed tensor gets transposed, and that each call changes."""
    striped.calls += 1  # type: ignore[attr-defined]
    i, j = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij")
    return ((7 * (i + j) + 3 * i * j + striped.calls) % 5 < 3).to(x.dtype)  # type: ignore[attr-defined]


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Both libraries draw the same masks, call by call."""
    monkeypatch.setattr(torch, "bernoulli", striped)

    def restart() -> None:
        striped.calls = 0  # type: ignore[attr-defined]

    return restart


THREE: dict[str, dict[str, Any]] = {"a": {}, "b": {"lora_alpha": 3}, "c": {"lora_alpha": 9}}


@pytest.mark.parametrize("weights", [[1.0, 0.5, 2.0], [1.0, -0.5, 0.7], [-1.0, 0.5, -0.2]], ids=str)
@pytest.mark.parametrize(
    ("kind", "sign"), [(t, "total") for t in TYPES] + [(t, "frequency") for t in TYPES if "ties" in t]
)
def test_types(kind: str, weights: list[float], sign: str, stripes: Callable[[], None]) -> None:
    """Every type, with positive and negative weights, on linear layers, Conv1D and embeddings."""
    models = []
    for library in (trimtab, peft):
        stripes()
        model = build(library, THREE)
        model.add_weighted_adapter(NAMES, weights, "new", kind, density=0.6, majority_sign_method=sign)
        models.append(model)
    ours, theirs = models
    assert_same(ours, theirs)
    assert config(ours) == config(theirs)
    assert ours.active_adapters == theirs.active_adapters == ["a"]
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert trains[0] == trains[1]
    for model in models:
        model.set_adapter("new")
    one, two = ours(tokens()), theirs(tokens())
    assert (one - two).abs().max() <= 1e-4 * max(1.0, two.abs().max())


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "magnitude_prune"])
@pytest.mark.parametrize("other", ["mica", True])
def test_mica_is_a_pair_like_any_other(kind: str, other: Any) -> None:
    own = {"init_lora_weights": "mica", "target_modules": ["up", "head"]}
    assert_same(*both({"a": own, "b": {**own, "init_lora_weights": other}}, [1.0, -0.5], kind, density=0.6))


@pytest.mark.parametrize("density", [0.2, 0.9, 1.0])
def test_density(density: float) -> None:
    for kind in ("ties", "magnitude_prune", "ties_svd"):
        assert_same(*both(THREE, [1.0, -0.5, 0.7], kind, density=density))


@pytest.mark.parametrize(
    "options", [{"svd_rank": 1}, {"svd_rank": 5}, {"svd_clamp": 0.8}, {"svd_full_matrices": False}], ids=str
)
def test_svd_options(options: dict[str, Any]) -> None:
    for kind in ("svd", "magnitude_prune_svd"):
        ours, theirs = both(THREE, [1.0, -0.5, 0.7], kind, density=0.6, **options)
        assert_same(ours, theirs)
        assert config(ours) == config(theirs)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd"])
def test_unequal_ranks_and_scales(kind: str) -> None:
    """Ranks that differ, patterns, rsLoRA in an adapter that is not the first, other targets."""
    configs = {
        "a": {"rank_pattern": {"down": 4}, "alpha_pattern": {"up": 5}},
        "b": {"r": 2, "use_rslora": True, "target_modules": ["up", "head"]},
    }
    assert_same(*both(configs, [1.0, -0.5], kind, density=0.6))


@pytest.mark.parametrize("targets", [("up", "head|embed"), (["up"], ["head", "embed"])], ids=str)
def test_targets_are_united(targets: tuple[Any, Any]) -> None:
    ours, theirs = both({n: {"target_modules": t} for n, t in zip("ab", targets, strict=True)}, [1.0, 2.0], "svd")
    assert_same(ours, theirs)
    assert ours.peft_config["new"].target_modules == theirs.peft_config["new"].target_modules


@pytest.mark.parametrize(
    ("configs", "kind"),
    [
        ({"a": {"target_modules": ["up"]}, "b": {"target_modules": "up"}}, "cat"),
        ({"a": {}, "b": {"r": 2}}, "linear"),
        ({"a": {}, "b": {"r": 2}}, "dare_ties"),
        ({n: {"target_modules": ["up"], "modules_to_save": ["head"]} for n in "ab"}, "cat"),
        ({"a": {}, "b": {}}, "mean"),
    ],
)
def test_both_refuse(configs: dict[str, dict[str, Any]], kind: str) -> None:
    for library in (trimtab, peft):
        with pytest.raises(ValueError):
            build(library, configs).add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", kind, density=0.5)


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_peft_loads_the_result(kind: str, tmp_path: Path) -> None:
    """Ranks that differ from layer to layer are written in the pattern, in a form that PEFT reads as we do."""
    configs = {"a": {"rank_pattern": {"down": 4}, "use_rslora": True}, "b": {"rank_pattern": {"down": 4}}}
    ours = build(trimtab, configs)
    ours.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", kind)
    ours.set_adapter("new")
    ours.save_pretrained(str(tmp_path), selected_adapters=["new"], save_embedding_layers=False)
    theirs = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "new"))
    assert torch.allclose(ours(tokens()), theirs(tokens()), atol=1e-4)


def test_differences() -> None:
    """Where PEFT is wrong or silent: rsLoRA counted twice, a rank no tensor has, a taken name, lost weights."""
    rs = {n: {"use_rslora": True} for n in "ab"}
    ours, theirs = both(rs, [1.0, 1.0], "cat")
    mine, other = deltas(ours), deltas(theirs)
    assert all(torch.allclose(other[p], 6**0.5 * mine[p], rtol=1e-3, atol=1e-3) for p in mine)
    ours, theirs = both({n: {"rank_pattern": {"down": 4}} for n in "ab"}, [1.0, 1.0], "linear")
    assert len(theirs.base_model.model.up.lora_A["new"].weight) == 3 != theirs.peft_config["new"].r
    assert theirs.peft_config["new"].rank_pattern == {}
    assert ours.peft_config["new"].resolve("up").r == 3
    theirs.add_weighted_adapter(["a", "b"], [1.0], "new")  # says nothing
    for arguments in ((["a", "b"], [1.0, 1.0], "new"), (["a", "b"], [1.0], "other")):
        with pytest.raises(ValueError):
            ours.add_weighted_adapter(*arguments)


def test_ia3(tmp_path: Path) -> None:
    """The scales of IA3 add up; a layer that one of the adapters leaves alone has the others' alone."""
    fields = [
        {"target_modules": ["up", "down"], "feedforward_modules": ["down"]},
        {"target_modules": ["up", "head"], "feedforward_modules": []},
    ]
    models = []
    for library in (trimtab, peft):
        model = library.get_peft_model(toy(), library.IA3Config(**fields[0]), "a")
        model.add_adapter("b", library.IA3Config(**fields[1]))
        draw = torch.Generator().manual_seed(5)
        for name, parameter in sorted(model.named_parameters()):
            if "ia3_" in name:
                parameter.data = torch.randn(parameter.shape, generator=draw)
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new")
        model.set_adapter("new")
        models.append(model.eval())
    ours, theirs = models
    assert config(ours) == config(theirs) | {"fan_in_fan_out": config(ours)["fan_in_fan_out"]}  # ours is found out
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    theirs.save_pretrained(tmp_path, selected_adapters=["new"])
    again = trimtab.PeftModel.from_pretrained(toy(), tmp_path / "new")
    torch.testing.assert_close(again.eval()(tokens()), theirs(tokens()))


def test_a_bias_in_some_layers_only() -> None:
    """PEFT forgets the biases of B."""
    configs = {"a": {"target_modules": ["up"], "lora_bias": True}, "b": {"target_modules": ["down"]}}
    ours, theirs = both(configs, [0.5, 2.0], "cat")
    assert_same(ours, theirs)
    found, other = ({n: p for n, p in m.named_parameters() if n.endswith("new.bias")} for m in (ours, theirs))
    assert found.keys() == other.keys()
    assert not any(p.any() for p in other.values())
    given = next(p for n, p in ours.named_parameters() if n.endswith("up.lora_B.a.bias"))
    for name, bias in found.items():
        torch.testing.assert_close(bias, given * 0.5 * 2 if ".up." in name else torch.zeros_like(bias))
