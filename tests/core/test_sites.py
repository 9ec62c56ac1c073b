"""Each kind of site against the layer it shows: its matrix, its products, and its computation with another weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.pytorch_utils import Conv1D

import trimtab
from tests.models import AttentionNet, EncoderNet
from trimtab import LoraConfig, get_peft_model
from trimtab.core.site import Site, site_class
from trimtab.errors import ConfigError, NoMatchingPeftModuleError, ReadOnlyWeight, RouteError
from trimtab.layer.originals import Originals


def owner_of(layer: nn.Module) -> Any:
    """What stands around a layer, as far as a site looks at it."""
    owner = SimpleNamespace(base_layer=layer, frozen=layer, prefix="")
    owner.originals = Originals(owner)
    return owner


def site_of(layer: nn.Module, param: str | None = None) -> Site:
    """The site of a layer, or of a parameter of it."""
    cls = site_class(layer, param)
    assert cls is not None
    return cls(owner_of(layer), "here", param or "")


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- convolutions
@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    """Any convolution and an input for it."""
    n = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    size = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n))
    kernel, dilation = size(1, 3), size(1, 2)
    padding = draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * n if padding == "same" else size(1, 2)
    layer = getattr(nn, f"Conv{n}d")(
        4, 8, kernel, stride=stride, padding=size(0, 2) if padding is None else padding, dilation=dilation,
        groups=groups, bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    return layer, noise(2, 4, *(6 for _ in range(n)), seed=9)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(0, 99))
def test_convolution(case: tuple[nn.Module, Tensor], seed: int) -> None:
    """apply(x, W) + b is the layer; run with W is the layer; low-rank products equal the weight they stand for."""
    layer, x = case
    site = site_of(layer)
    W, b, wanted = site.matrix(), site.bias(), layer(x)
    assert W.shape == (site.fan_out, site.fan_in)
    near(site.run(W, b, x), wanted)
    y = site.apply(x, W)
    near(y if b is None else y + site.spread(b), wanted)
    assert torch.equal(site.store(W), layer.weight)
    A, B = noise(*site.down(4), seed=seed), noise(*site.up(4), seed=seed + 1)
    product = site.upper(B) @ site.lower(A)
    assert product.shape == W.shape
    low = site.mix(site.apply(x, site.lower(A)), site.upper(B))
    near(low / 10, site.apply(x, product) / 10)
    near(site.run(W + product, b, x) / 10, (wanted + low) / 10)


def test_grouped_convolution_cannot_hold_what_leaves_its_groups() -> None:
    site = site_of(nn.Conv2d(4, 8, 3, groups=2))
    W = site.matrix()
    assert torch.equal(site.store(W * 3), site.layer.weight * 3)  # type: ignore[operator]
    with pytest.raises(ReadOnlyWeight, match="2 groups"):
        site.store(W + 1)
    with pytest.raises(ConfigError, match="the rank is divisible by groups"):
        site.down(3)


def test_convolution_whose_class_pads_by_itself() -> None:
    """A subclass with a forward of its own (as timm has) is followed, not guessed at."""

    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(F.pad(x, (2, 0, 1, 0)), self.weight, self.bias)

    layer, x = Padded(4, 6, 3), noise(2, 4, 7, 7)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)).eval()
    wanted = model(x)
    model.merge_adapter()
    near(model(x), wanted)


def test_padding_modes_agree_with_the_merged_layer() -> None:
    """PEFT pads the adapter's input with zeros whatever the layer does, so that merging changes its outputs."""
    for mode in ("reflect", "replicate", "circular"):
        layer, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), noise(2, 4, 7, 7)
        config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        model = get_peft_model(nn.Sequential(layer), config).eval()
        wanted = model(x)
        model.merge_adapter()
        near(model(x), wanted)


# ---------------------------------------------------------------------- parameters
def experts(transposed: bool) -> nn.Module:
    """Three experts."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = transposed
            self.up = nn.Parameter(noise(3, 5, 7) if transposed else noise(3, 7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up if transposed else self.up.mT)

    return Experts()


@pytest.mark.parametrize("transposed", [False, True])
def test_stack_of_experts(transposed: bool) -> None:
    layer, x = experts(transposed), noise(3, 4, 5)
    site = site_of(layer, "up")
    W = site.matrix()
    assert (site.batch, site.fan_out, site.fan_in, tuple(W.shape)) == ((3,), 7, 5, (3, 7, 5))
    near(torch.einsum("eoi,eti->eto", W, x), layer(x))
    near(site.run(2 * W, None, x), 2 * layer(x))
    assert torch.equal(site.store(W), layer.up)
    assert (site.down(2), site.up(2), site.vector()) == ((6, 5), (7, 6), (3, 7))
    A, B = noise(6, 5, seed=1), noise(7, 6, seed=2)
    product = site.upper(B) @ site.lower(A)
    for e in range(3):  # rows of A: expert after expert; columns of B: rank after rank
        by_hand = sum(torch.outer(B[:, i * 3 + e], A[e * 2 + i]) for i in range(2))
        near(product[e], by_hand)  # type: ignore[arg-type]
    site.lower(A).zero_()
    site.upper(B).zero_()
    assert not A.any(), "views write through"
    assert not B.any()


def test_rows_of_parameters_are_known_or_refused() -> None:
    config = SimpleNamespace(num_local_experts=3, hidden_size=4, intermediate_size=6, hidden_act="silu",
                             num_experts_per_tok=2, _experts_implementation="eager")  # fmt: skip
    site = site_of(MixtralExperts(config), "down_proj")
    x, index, weights = noise(8, 4), torch.zeros(8, 2, dtype=torch.long), noise(8, 2)
    assert site.rows((x, index, weights), {})[0] == 8
    args, kwargs = site.cut((x,), {"top_k_index": index, "top_k_weights": weights}, torch.tensor([2, 5]))
    assert torch.equal(args[0], x[[2, 5]])
    assert len(kwargs["top_k_index"]) == len(kwargs["top_k_weights"]) == 2
    with pytest.raises(RouteError, match="cannot be known"):
        site.rows((x,), {})  # Llama 4: every token once for each expert, in an order of its own
    router = site_of(MixtralTopKRouter(config), "weight")
    assert (router.batch, router.fan_out, router.fan_in) == ((), 3, 4)
    assert router.rows((x,), {})[0] == 8
    parts = [(noise(2, 3), noise(2, 2)), (noise(1, 3), noise(1, 2))]
    joined = router.join(parts, torch.tensor([2, 0, 1]))
    assert torch.equal(joined[0][0], parts[1][0][0])


def test_parameters_that_cannot_be_adapted() -> None:
    model = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="1 dimensions"):
        get_peft_model(model(), LoraConfig(target_modules=[], target_parameters=["1.weight"]))
    with pytest.raises(ConfigError, match="one of them only"):
        get_peft_model(model(), LoraConfig(target_modules=["0"], target_parameters=["0.weight"]))
    with pytest.raises(NoMatchingPeftModuleError, match=r"weight"):
        get_peft_model(model(), LoraConfig(target_modules=[], target_parameters=["0.wieght"]))
    with pytest.warns(trimtab.errors.PeftWarning, match=r"fit no parameter"):
        get_peft_model(model(), LoraConfig(target_modules=[], target_parameters=["0.weight", "nothing"]))
    with pytest.raises(ConfigError, match="no bias"):
        get_peft_model(model(), LoraConfig(target_modules=[], target_parameters=["0.weight"], lora_bias=True))


# ---------------------------------------------------------------------- norms
@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), LlamaRMSNorm(6), GemmaRMSNorm(6),
                                   nn.BatchNorm1d(6)], ids=lambda x: type(x).__name__)  # fmt: skip
def test_norm(layer: nn.Module) -> None:
    layer.eval()
    site, x = site_of(layer), noise(3, 6)
    W, b = site.matrix(), site.bias()
    assert (site.kind, tuple(W.shape), site.fan_out, site.fan_in) == ("vector", (6, 1), 6, 1)
    near(site.run(W, b, x), layer(x))
    changed = W + 1
    layer.weight.data.add_(1)
    near(site.run(changed, b, x), layer(x))
    assert torch.equal(site.store(changed), layer.weight)


def test_what_no_site_fits() -> None:
    for layer in (nn.LayerNorm(4, elementwise_affine=False), nn.ReLU(), nn.ConvTranspose2d(2, 2, 1), nn.LSTM(2, 2)):
        assert site_class(layer) is None
    layers = (nn.Linear(2, 2), Conv1D(2, 2), nn.Embedding(2, 2))
    kinds = {type(x).__name__: cls.kind for x in layers if (cls := site_class(x))}
    assert kinds == {"Linear": "linear", "Conv1D": "linear", "Embedding": "embedding"}


# ---------------------------------------------------------------------- attention
def attend(layer: nn.MultiheadAttention, q: Tensor, k: Tensor, inw: Tensor, outw: Tensor) -> Tensor:
    """Multi-head attention in plain steps, rows first."""
    heads, width = layer.num_heads, layer.embed_dim
    wq, wk, wv = inw.chunk(3)
    bq, bk, bv = layer.in_proj_bias.chunk(3)
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)
    Q, K, V = split(q @ wq.T + bq), split(k @ wk.T + bk), split(k @ wv.T + bv)
    scores = (Q @ K.mT / (width // heads) ** 0.5).softmax(-1)
    return (scores @ V).transpose(1, 2).flatten(2) @ outw.T + layer.out_proj.bias


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention(batch_first: bool, grad: bool) -> None:
    """W + s·B·A at both projections, in every mode of the layer; mixed rows are the rows of each alone."""
    base = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = base

        def forward(self, q: Tensor, k: Tensor, **more: Any) -> Any:
            y, weights = self.attn(turn(q), turn(k), turn(k), **more)
            return turn(y), weights

    model = get_peft_model(
        Net(), LoraConfig(target_modules=["attn"], r=3, lora_alpha=6, init_lora_weights=False)
    ).eval()
    model.add_adapter("b", LoraConfig(target_modules=["attn"], r=2, init_lora_weights=False))
    model.eval()
    layer = model.get_base_model().attn
    q, k = noise(3, 4, 8), noise(3, 5, 8, seed=1)
    with torch.set_grad_enabled(grad):
        got = model(q, k)[0]
        out = layer.frozen._modules["out_proj"]
        delta = lambda x: 2 * x.lora_B["default"].weight @ x.lora_A["default"].weight
        near(got, attend(base, q, k, base.in_proj_weight + delta(layer), out.base_layer.weight + delta(out)))
        near(out.weight, out.base_layer.weight + delta(out))
        model.set_adapter("b")
        other = model.eval()(q, k)[0]
        names = ["b", "default", "__base__"]
        with model.disable_adapter():
            plain = model(q, k)[0]
        bias = noise(6, 4, 5, seed=3)  # (rows·heads, T, S)
        mixed, weights = model(q, k, adapter_names=names)
        near(mixed, torch.stack([other[0], got[1], plain[2]]))
        assert weights.shape == (3, 4, 5)
        masked, weights = model(q, k, attn_mask=bias, need_weights=False, adapter_names=names)
        alone, _ = model(q, k, attn_mask=bias, need_weights=False)
        near(masked[0], alone[0])
        assert weights is None


def test_attention_that_cannot_be_adapted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, kdim=4)

    with pytest.raises(ConfigError, match="kdim=4"):
        get_peft_model(Net(), LoraConfig(target_modules=["attn"]))
    model = get_peft_model(Net(), LoraConfig(target_modules=[], target_parameters=["q_proj_weight"], r=2))
    assert model.targeted_parameter_names == ["attn.q_proj_weight"]


def test_output_projection_alone_acts() -> None:
    """PEFT accepts it and leaves the output as it was, since the attention reads the weight past the adapter."""
    ids = torch.arange(12).view(2, 6)
    net = AttentionNet()
    wanted = net(ids)
    model = get_peft_model(net, LoraConfig(target_modules=["out_proj"], r=2, init_lora_weights=False)).eval()
    got = model(ids)
    assert not torch.allclose(got, wanted, atol=1e-3)
    model.merge_adapter()
    near(model(ids), got)
    model.unmerge_adapter()
    with pytest.raises(RouteError, match="read, not called"):
        model(ids, adapter_names=["default", "__base__"])
    everything = get_peft_model(AttentionNet(), LoraConfig(target_modules="all-linear", r=2))
    assert everything.targeted_module_names == ["head"]


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["self_attn", "linear2"]], ids=str)
def test_transformer_encoder_takes_no_way_past_an_adapter(targets: list[str]) -> None:
    """PyTorch's fused encoder reads weights off its layers in evaluation mode without gradients."""
    ids = torch.arange(12).view(2, 6)
    net = EncoderNet().eval()
    before = {n: dict(m.__dict__) for n, m in net.named_modules() if type(m).__name__.startswith("TransformerEncoder")}
    with torch.no_grad():
        wanted = net(ids)
    model = get_peft_model(net, LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    slow = model(ids).detach()
    with torch.no_grad():
        fast = model(ids)
        assert not torch.allclose(fast, wanted, atol=1e-3)
        near(fast, slow)
        with model.disable_adapter():
            near(model(ids), wanted)
        model.merge_adapter()
        near(model(ids), slow)
        back = model.unload()
        assert torch.equal(back(ids), wanted)
    for name, attributes in before.items():
        now = back.get_submodule(name).__dict__
        assert {k: now[k] for k in ("activation_relu_or_gelu", "use_nested_tensor") if k in now} == {
            k: attributes[k] for k in ("activation_relu_or_gelu", "use_nested_tensor") if k in attributes
        }
