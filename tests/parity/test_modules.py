"""Modules that hold a part of a formula in peft, and its programs may build by themselves: the same for same tensors."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.parity.pairs import BOTH, quiet
from tests.parity.test_parts import both, numbers


def twins(path: str, name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """One module each, of the same parameters and buffers."""
    ours, theirs = (module(*args, **kwargs) for module in both(path, name))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    return [ours, theirs]


def close(results: list[Any]) -> None:
    torch.testing.assert_close(results[0], results[1])


# ------------------------------------------------------------------ DoRA
LAYERS = {
    "DoraLinearLayer": (lambda: nn.Linear(5, 7), (2, 5), (7, 2), (3, 5)),
    "DoraConv1dLayer": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 3), (6, 2, 1), (2, 4, 5)),
    "DoraConv2dLayer": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 3, 3), (6, 2, 1, 1), (2, 4, 5, 5)),
    "DoraConv3dLayer": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 2, 2, 2), (6, 2, 1, 1, 1), (2, 4, 3, 3, 3)),
    "Conv1D": (lambda: Conv1D(7, 5), (2, 5), (7, 2), (3, 5)),
}


def pair_like(layer: nn.Module, A: Tensor, B: Tensor) -> tuple[nn.Module, nn.Module]:
    """The pair as layers of their own."""
    if isinstance(layer, nn.Linear | Conv1D):
        down, up = nn.Linear(A.shape[1], A.shape[0], bias=False), nn.Linear(B.shape[1], B.shape[0], bias=False)
    else:
        kind: Any = type(layer)
        down = kind(A.shape[1], A.shape[0], A.shape[2:], layer.stride, layer.padding, bias=False)
        up = kind(B.shape[1], B.shape[0], 1, bias=False)
    down.weight.data, up.weight.data = A.clone(), B.clone()
    return down, up


@pytest.mark.parametrize("name", LAYERS)
def test_dora_layers(name: str) -> None:
    make, *shapes = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    A, B, x = numbers(*shapes)
    flipped = name == "Conv1D"
    results: list[list[Any]] = [[], []]
    for which, module in enumerate(both("peft.tuners.lora.dora", "DoraLinearLayer" if flipped else name)):
        dora = module(flipped)
        down, up = pair_like(layer, A, B)
        dora.update_layer(base_layer=layer, lora_A=down.weight, lora_B=up.weight, scaling=0.5)
        results[which].append(dora.weight.detach().clone())
        dora.weight.data *= 1.3
        for result in (None, layer(x)):
            given = x.clone().requires_grad_()
            own = {} if result is None else {"base_result": result.detach()}
            y = dora(given, lora_A=down, lora_B=up, scaling=0.5, base_layer=layer, **own)
            parameters = (given, dora.weight, down.weight, up.weight)
            results[which] += [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]
        dW = dora.get_lora_weight(down, up)
        norm = dora.get_weight_norm(layer.weight, dW if flipped else dW.view_as(layer.weight), 0.5)
        results[which] += [dW.detach(), norm.detach()]
    close(results)


def test_dora_of_an_embedding() -> None:
    torch.manual_seed(0)
    layer, ids = nn.Embedding(9, 5), torch.tensor([[1, 2, 8]])
    A, B = numbers((2, 9), (5, 2))
    results: list[list[Any]] = [[], []]
    for which, module in enumerate(both("peft.tuners.lora.dora", "DoraEmbeddingLayer")):
        dora, (a, b) = module(True), (A.clone().requires_grad_(), B.clone().requires_grad_())
        dora.update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=0.5)
        dora.weight.data *= torch.arange(1.0, 6.0)
        g, y = dora(ids, lora_A=a.T, lora_B=b.T, scaling=0.5, base_layer=layer, embed_fn=F.embedding)
        total = (g * layer(ids).detach() + y).square().sum()
        results[which] += [g.detach(), y.detach(), *torch.autograd.grad(total, (dora.weight, a, b))]
        results[which].append(dora.get_lora_weight(a.T, b.T).detach())
    close(results)


# ------------------------------------------------------------------ BD-LoRA, VeLoRA, GLoRA
def test_block_diagonal_linear() -> None:
    modules = twins("peft.tuners.lora.variants", "BlockDiagonalLinear", 6, 8, 2)
    (x,) = numbers((3, 6))
    close([m(x) for m in modules])
    close([m.weight_as_blockdiagonal_matrix() for m in modules])
    for module in both("peft.tuners.lora.variants", "BlockDiagonalLinear"):
        assert not module(6, 8, 2, init_zero=True).weight.any()
        wide = module(600, 800, 4).weight
        assert abs(wide.std() - (2 / 150) ** 0.5) < 0.005
        with pytest.raises(ValueError, match="divisible"):
            module(5, 8, 2)


@pytest.mark.parametrize("groups", [3, 4])
@pytest.mark.parametrize("biased", [True, False])
def test_velora_function(groups: int, biased: bool) -> None:
    x, W, b, v, gradient = numbers((2, 4, 6), (3, 6), (3,), (2,), (2, 4, 3))
    results = []
    for function in both("peft.tuners.lora.velora", "VeloraFunction"):
        leaves = [t.clone().requires_grad_() for t in ((x, W, b) if biased else (x, W))]
        bias = leaves[2] if biased else None
        y = function.apply(leaves[0], leaves[1], bias, F.normalize(v, dim=0), groups, 0.7)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
    close(results)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("GloraLoraPath", (6, 5, 2)),
        ("GloraVectorPath", (6,)),
        ("GloraVectorPath", (6, False)),
        ("GloraScalarPath", ()),
        ("GloraEmptyPath", ((6, 5),)),
        ("GloraEmptyPath", (6,)),
        ("GloraEmptyPath", ()),
    ],
)
def test_paths_of_glora(name: str, args: tuple[Any, ...]) -> None:
    starts = []
    for module in both("peft.tuners.glora.layer", name):
        paths = [module(*args)]
        if "Empty" not in name:
            paths.append(module(*args, init_weights=False))
        for path in paths:
            torch.manual_seed(3)
            path.reset_parameters(path is paths[0])
        assert issubclass(module, both("peft.tuners.glora.layer", "GloraPath")[len(starts)])
        starts.append([(path.state_dict(), path()) for path in paths])
    close(starts)
    for base in both("peft.tuners.glora.layer", "GloraPath"):
        with pytest.raises(NotImplementedError):
            base()()


# ------------------------------------------------------------------ MonteCLoRA
def sampler(**fields: Any) -> list[Any]:
    torch.manual_seed(0)
    return twins("peft.tuners.lora.monteclora", "MontecloraSampler", 5, 3, 4, sample_scaler=0.3, **fields)


def test_what_monteclora_makes_of_its_draws() -> None:
    modules = sampler()
    std, var, z, normal, matrix = numbers((3,), (3,), (4,), (4, 5, 3), (3, 3))
    std, var = std.exp().diag(), var.exp().diag()
    alpha = numbers((4,))[0].exp()
    close([m.wishart_reparameterization(std, matrix @ matrix.T) for m in modules])
    close([m.multivariate_reparameterization(normal, var) for m in modules])
    close([m.dirichlet_reparameterization(alpha, z) for m in modules])
    close([m.wishart_kl(std) for m in modules])
    close([m.multivariate_kl(var) for m in modules])
    ours, theirs = ({k: v.shape for k, v in m.sampler.get().items()} for m in modules)
    assert ours == theirs


@pytest.mark.parametrize("fields", [{}, {"use_entropy": False, "kl_loss_weight": 0.5}])
def test_a_draw_and_its_loss(fields: dict[str, Any]) -> None:
    """peft's divergence of the mixture's weights has a wrong sign in it: there it is given ours."""
    modules = sampler(**fields)
    drawn, results = modules[0].sampler.get(), []
    modules[1].dirichlet_kl = modules[0].dirichlet_kl
    assert modules[0].dirichlet_kl(torch.ones(4)) == 0
    for module in modules:
        module.sampler.get = lambda: drawn
        noise, weights = module.train()()
        far, uneven = module.get_variational_loss()
        total = noise.square().sum() + weights.square().sum() + far + uneven
        total.backward()
        results.append(
            [
                noise.detach(),
                weights.detach(),
                float(torch.as_tensor(far).detach()),
                float(torch.as_tensor(uneven).detach()),
                *(p.grad for p in module.parameters()),
            ]
        )
        assert module.eval().get_variational_loss() == (0.0, 0.0)
    close(results)
    copy.deepcopy(modules[0])


def test_draws_are_spread_alike() -> None:
    for module, buffered in zip(
        both("peft.tuners.lora.monteclora", "MontecloraSampler"),
        both("peft.tuners.lora.monteclora", "BufferedMontecloraSampler"),
        strict=True,
    ):
        torch.manual_seed(0)
        source = buffered(module(5, 3, 4), 10)
        drawn = [source.get() for _ in range(500)]
        assert abs(torch.stack([d["z_wishart"] for d in drawn]).mean(0) - 3 * torch.eye(3)).max() < 0.5
        assert abs(torch.stack([d["z_mvn"] for d in drawn]).std() - 1) < 0.05
        assert abs(torch.stack([d["z_dirichlet"] for d in drawn]).std() - 1) < 0.1


# ------------------------------------------------------------------ Arrow
@pytest.mark.parametrize("general", [False, True])
def test_arrow(general: bool) -> None:
    names = ["a", "b", "g", "h", "late", "arrow_router"]
    given = numbers(*[shape for _ in names for shape in ((2, 6), (5, 2))])
    for tensor in given[1::2]:
        tensor[:, 0] *= 5  # a first singular value far from the second: peft's directions are iterated
    (x,) = numbers((2, 3, 6))
    scaling, results = {n: 0.5 + i for i, n in enumerate(names)}, [[], []]
    for which, module in enumerate(both("peft.tuners.lora.arrow", "ArrowLoraLinearLayer")):
        config = BOTH[which].ArrowConfig(top_k=2, router_temperature=0.5, use_gks=general)
        config.task_adapter_names, config.gks_adapter_names = ["a", "b"], ["g", "h"]
        As, Bs = nn.ModuleDict(), nn.ModuleDict()
        for i, name in enumerate(names):
            As[name], Bs[name] = pair_like(nn.Linear(6, 5), given[2 * i], given[2 * i + 1])
        arrow = module(6, config)
        arrow.gen_know_sub(As, Bs)
        arrow.build_prototypes(As, Bs)
        y = arrow(x, As, Bs, nn.Identity(), scaling)
        results[which] += [y.detach(), arrow.prototypes.abs(), *torch.autograd.grad(y.sum(), [As["a"].weight])]
        vector = arrow.top_right_singular_vec_from_BA(As["a"].weight, Bs["a"].weight)
        results[which].append(vector.detach().abs())
        arrow.on_adapter_change(As, Bs)
        arrow.gen_know_sub(As, Bs)
        assert arrow.task_adapter_names == ["a", "b", "g", "h", "late"]
        if which == 0:  # peft's keeps the two directions that it had, and fails
            assert arrow(x, As, Bs, nn.Identity(), scaling).shape == y.shape
            assert arrow.prototypes.shape == (5, 6)
        results[which] += [p.detach() for p in (*As.parameters(), *Bs.parameters())]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ EVA
def flat(layer_input: Any, model_input: Any, name: str) -> Tensor:
    return layer_input[0].flatten(0, -2)


@pytest.mark.parametrize("own", [{}, {"prepare_layer_inputs_fn": flat}])
def test_hooks_of_eva(own: dict[str, Any]) -> None:
    batches = numbers(*[(3, 4, 5)] * 4)
    batches.append(batches[1])
    results: list[list[Any]] = [[], []]
    for which in (0, 1):
        layer = nn.Linear(5, 5)
        svd = both("peft.tuners.lora.eva", "SVDHook")[which](n_components=3, sim_thresh=0.9, name="layer", **own)
        seen = both("peft.tuners.lora.eva", "HashHook")[which](name="layer", **own)
        for hook in (svd, seen):
            layer.register_forward_hook(hook)
        for batch in batches:
            layer(batch)
            results[which] += [svd.converged, svd.svd.components_.abs(), svd.svd.explained_variance_ratio_]
        results[which].append(seen.hashed_inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer(batches[0][:1, :2])  # too few rows
        results[which].append(int(svd.svd.n_samples_seen_))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3, check_dtype=False)


def test_a_hook_gets_what_the_model_got() -> None:
    for module in both("peft.tuners.lora.eva", "HashHook"):
        calls = []

        def noted(*args: Any, calls: list[Any] = calls) -> Tensor:
            calls.append(args)
            return args[0][0]

        hook, layer = module(name="layer", prepare_layer_inputs_fn=noted), nn.Linear(2, 2)
        hook.model_input = "batch"
        layer.register_forward_hook(hook)
        layer(torch.ones(1, 2))
        assert calls[0][1:] == ("batch", "layer")
        plain = module(name="layer")
        with pytest.raises(TypeError):
            plain.prepare_layer_inputs({"x": torch.ones(1, 2)})


# ------------------------------------------------------------------ X-LoRA
class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv1d, self.tokens = nn.Linear(5, 7), Conv1D(7, 5), nn.Embedding(9, 5)
        self.picture = nn.Conv2d(4, 6, 3)


NAMES = ["linear", "conv1d", "tokens", "picture"]


def mixtures() -> list[Any]:
    """The layers with two active adapters."""
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        model = Layers()
        for name, alpha in (("0", 8), ("1", 5)):
            config = library.LoraConfig(r=2, lora_alpha=alpha, target_modules=NAMES, init_lora_weights=False)
            model = model.add_adapter(name, config) or model if name == "1" else quiet(
                library.get_peft_model, model, config, name
            )  # fmt: skip
        model.base_model.set_adapter(["0", "1"])
        found.append(model)
    held = dict(found[0].named_parameters())
    for name, parameter in found[1].named_parameters():
        parameter.data = held[name].detach().clone()
    return found


class Switch(nn.Module):
    disabled = False


@pytest.mark.parametrize("fields", [{}, {"top_k_lora": 1}, {"top_k_lora": 2, "enable_softmax_topk": True}])
def test_layers_of_xlora(fields: dict[str, Any]) -> None:
    inputs = {"linear": numbers((2, 3, 5))[0], "conv1d": numbers((2, 3, 5))[0], "tokens": torch.tensor([[1, 2, 8]] * 2)}
    inputs["picture"] = numbers((2, 4, 5, 5))[0]
    weights = numbers((2, 3, 2, 2))[0].sigmoid()
    results: list[list[Any]] = [[], []]
    for which, model in enumerate(mixtures()):
        config = quiet(
            BOTH[which].XLoraConfig, hidden_size=8, adapters={"0": "", "1": ""}, global_scaling_weight=1.5, **fields
        )
        switch = Switch()
        for number, name in enumerate(NAMES):
            kind = {"tokens": "XLoraEmbeddingLayer", "picture": "XLoraConv2dLayer"}.get(name, "XLoraLinearLayer")
            layer = getattr(model.base_model.model, name)
            mixed = both("peft.tuners.xlora.layer", kind)[which](switch, layer, layer.forward, number % 2, config)
            scalings = weights[:1, :1] if name == "picture" else weights
            results[which] += [mixed.forward(inputs[name], scalings=scalings), mixed.forward(inputs[name])]
            switch.disabled = True
            results[which].append(mixed.forward(inputs[name], scalings=scalings))
            switch.disabled = False
            results[which].append(mixed.get_maybe_topk_scalings(weights))
    close(results)


def test_converting_layers() -> None:
    (x,), weights = numbers((2, 3, 5)), numbers((2, 3, 4, 2))[0].sigmoid()
    results: list[list[Any]] = [[], []]
    for which, model in enumerate(mixtures()):
        config = BOTH[which].XLoraConfig(hidden_size=8, adapters={"0": "", "1": ""})
        convert = both("peft.tuners.xlora.model", "convert_layers_to_xlora")[which]
        assert convert(model.base_model, Switch(), config) == (4, torch.device("cpu"))
        layers = model.base_model.model
        results[which] += [layers.linear(x, scalings=weights), layers.conv1d(x, scalings=weights), layers.linear(x)]
        assert convert(Layers(), Switch(), config) == (0, None)
    close(results)


# ------------------------------------------------------------------ transformers' conversions
@pytest.mark.parametrize(
    ("name", "dims"),
    [(n, d) for n, ds in (("FlattenDims", (0, 1, (0, 1), (-2, -1))), ("PermuteDims", ((2, 0, 1),))) for d in ds],
)
def test_axes(name: str, dims: Any) -> None:
    given = dict(zip("ab", numbers((2, 3, 4), (5, 3, 4)), strict=True))
    steps = [step(dims) for step in both("peft.utils.transformers_weight_conversion", name)]
    close([step.convert(given, ["a", "b"], ["c"], config=None) for step in steps])
    for step in steps:
        with pytest.raises(NotImplementedError):
            step.reverse_op


@pytest.mark.parametrize("shapes", [[(3, 2), (4, 2)], [(4, 3, 2), (4, 3, 2)], [(4, 3, 2), (4, 5, 2), (4, 3, 1)]])
def test_block_diagonal_factors(shapes: list[tuple[int, ...]]) -> None:
    given = {str(i): tensor for i, tensor in enumerate(numbers(*shapes))}
    results = []
    for step in both("peft.utils.transformers_weight_conversion", "PeftConcatenate"):
        results.append(step(1).convert(given, list(given), ["x"], full_layer_name="layer.lora_B"))
        with pytest.raises(NotImplementedError):
            step(1).reverse_op
    close(results)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("peft.tuners.lora.dora", "DoraLinearLayer DoraEmbeddingLayer DoraConv2dLayer"),
        ("peft.tuners.lora.arrow", "ArrowLoraLinearLayer"),
        ("peft.tuners.lora.monteclora", "MontecloraSampler BufferedMontecloraSampler"),
        ("peft.tuners.lora.variants", "BlockDiagonalLinear"),
        ("peft.tuners.lora.eva", "SVDHook HashHook"),
        ("peft.tuners.xlora.layer", "XLoraLinearLayer"),
        ("peft.tuners.glora.layer", "GloraLoraPath GloraVectorPath GloraScalarPath GloraEmptyPath"),
    ],
)
def test_arguments(path: str, names: str) -> None:
    for name in names.split():
        ours, theirs = (inspect.signature(cls).parameters for cls in both(path, name))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
