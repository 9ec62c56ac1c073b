"""Products by oneDNN, where the processor has them faster: the same numbers, gradients included, in every layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab import LoHaConfig, get_peft_model
from trimtab.core.kernels import dense
from trimtab.layer import adapted

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
pytestmark = pytest.mark.skipif(ONEDNN is None, reason="this torch has no oneDNN")
N, IN, OUT, R = 96, 160, 112, 16

LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "reversed storage": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is asked on every processor, for small products as well; what it was asked for is noted."""
    seen: list[tuple[int, ...]] = []

    def noted(x: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(x.shape))
        return ONEDNN.default(x, *rest)

    for module in (dense, adapted):
        monkeypatch.setattr(module, "ONEDNN", noted)
    monkeypatch.setattr(dense, "LEAST", 1)
    return seen


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("of_W", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_products(of_x: str, of_W: str) -> None:
    x, W, b = LAYOUTS[of_x](torch.randn(N, IN)), LAYOUTS[of_W](torch.randn(OUT, IN)), torch.randn(OUT)
    wide_x, wide_W = x.double(), W.double()
    close(dense.linear(x, W, b), F.linear(wide_x, wide_W, b.double()))
    close(dense.product(x, W.t()), wide_x @ wide_W.t())
    y = torch.randn(N, OUT)
    wanted = y.double() + wide_x @ wide_W.t()
    close(dense.accumulate(y, x, W.t()), wanted)
    close(y, wanted)
    low = LAYOUTS[of_W](torch.randn(N, R))
    close(dense.outer(x, low), wide_x.t() @ low.double())


def test_a_gradient_that_is_one_number(asked: list[tuple[int, ...]]) -> None:
    """`sum().backward()` gives an expanded tensor, whose rows lie on one another."""
    one = torch.ones(()).expand(N, IN)
    close(dense.linear(one, torch.ones(OUT, IN)), torch.full((N, OUT), float(IN)))
    assert not asked


@pytest.mark.parametrize("shape", [(N, IN), (4, N // 4, IN), (2, 3, N // 6, IN)])
def test_a_frozen_layer(shape: tuple[int, ...], asked: list[tuple[int, ...]]) -> None:
    x, W, b = torch.randn(shape, requires_grad=True), torch.randn(OUT, IN), torch.randn(OUT)
    y = dense.frozen_linear(x, W, b)
    assert y is not None
    wide = x.detach().double().requires_grad_()
    wanted = F.linear(wide, W.double(), b.double())
    close(y, wanted)
    weight = torch.randn_like(y)
    (dx,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
    (dwide,) = torch.autograd.grad((wanted * weight.double()).sum(), wide)
    close(dx, dwide)
    y = dense.frozen_linear(x, W, b)
    assert y is not None
    y.mul_(2).backward(weight)  # others may write into it
    assert x.grad is not None
    close(x.grad, 2 * dwide)
    assert len(asked) == 3  # forward twice, backward once: what is differentiated again is torch's own


def test_what_it_leaves_to_torch() -> None:
    x, W = torch.randn(N, IN), torch.randn(OUT, IN)
    assert dense.frozen_linear(x.double(), W.double(), None) is None
    assert dense.frozen_linear(x, W.requires_grad_(), None) is None
    W = W.detach()
    assert dense.frozen_linear(x, W, torch.zeros(OUT, requires_grad=True)) is None
    assert dense.frozen_linear(x[0], W, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.frozen_linear(x, W, None) is None
    assert torch.func.vmap(lambda v: F.linear(v, W))(x).shape == (N, OUT)


def test_a_count_of_operations_sees_torchs_own(asked: list[tuple[int, ...]]) -> None:
    with FlopCounterMode(display=False) as counter:
        dense.linear(torch.randn(N, IN), torch.randn(OUT, IN))
    assert counter.get_total_flops() == 2 * N * IN * OUT
    assert not asked


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_layers_of_any_method(asked: list[tuple[int, ...]]) -> None:
    """A method that has no fused step of its own goes by it, forward and backward; hooks are seen."""
    net = Net()
    model = get_peft_model(net, LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False))
    x = torch.randn(3, N // 3, IN)
    with model.disable_adapter():
        found = model(x)
    assert asked
    close(found, F.linear(torch.tanh(F.linear(x, net.up.base_layer.weight, net.up.base_layer.bias)),
                          net.down.base_layer.weight, net.down.base_layer.bias))  # fmt: skip
    seen: list[nn.Module] = []
    net.up.base_layer.register_forward_hook(lambda module, args, out: seen.append(module))
    with model.disable_adapter():
        model(x)
    assert seen
