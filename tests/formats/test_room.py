"""Memory for merged weights: each has its own, as if torch had taken it."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.formats import room


class Wide(nn.Module):
    """Weights large enough to be put into common memory, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(256, 520), nn.Linear(520, 256), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


NAMES = ["up", "down", "head"]


def adapted(dtype: torch.dtype, adapters: int = 1) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights=False)
    model = get_peft_model(Wide().to(dtype), config, "a0").eval()
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    model.set_adapter([f"a{i}" for i in range(adapters)])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_merge_is_rounded_once_and_undone_bit_by_bit(dtype: torch.dtype, adapters: int) -> None:
    model = adapted(dtype, adapters)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in NAMES}
    before = {name: layer.base_layer.weight for name, layer in layers.items()}
    bits = {name: W.detach().clone() for name, W in before.items()}
    deltas = {
        name: sum(
            1.5 * layer.lora_B[a].weight.double() @ layer.lora_A[a].weight.double() for a in model.active_adapters
        )
        for name, layer in layers.items()
    }
    for _ in range(2):
        model.merge_adapter()
        for name, layer in layers.items():
            exact = bits[name].double() + deltas[name]
            limit = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(layer.base_layer.weight.double(), exact, rtol=limit, atol=limit)
            assert layer.base_layer.weight.dtype == dtype
        model.unmerge_adapter()
        assert all(layer.base_layer.weight is before[name] for name, layer in layers.items())
        assert all(torch.equal(layer.base_layer.weight, bits[name]) for name, layer in layers.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_saved_copied_and_moved_like_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(dtype)
    x = torch.randn(3, 256, dtype=dtype)
    model.merge_adapter()
    state = model.state_dict()
    whole = {k: v.clone() for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "m.safetensors")  # refuses shared memory
    assert all(torch.equal(v, whole[k]) for k, v in load_file(tmp_path / "m.safetensors").items())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 1.2 * sum(v.nbytes for v in whole.values()) + 100_000
    twin = copy.deepcopy(model)
    with torch.no_grad():
        y = model(x)
        for W in twin.parameters():
            W.zero_()
        assert torch.equal(model(x), y)
    model.double()
    assert all(torch.equal(v, whole[k].double()) for k, v in model.state_dict().items())


def test_each_has_memory_of_its_own() -> None:
    own = room.Room(torch.float32)
    shapes = [(3, 50_001), (7,), (5_000, 5_000), (129, 1_025), (1, 1)]  # the third larger than a piece
    tensors = [own.take(shape).fill_(i) for i, shape in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert bool((tensor == i).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0


def test_there_is_none_outside_of_the_block_for_other_formats_small_weights_and_other_threads() -> None:
    W, seen = torch.zeros(300, 300), []
    assert room.spare(W, torch.float32) is None
    with room.opened(torch.float32):
        assert room.spare(W, torch.bfloat16) is None
        assert room.spare(torch.zeros(3, 3), torch.float32) is None
        other = threading.Thread(target=lambda: seen.append(room.spare(W, torch.float32)))
        other.start()
        other.join()
    assert seen == [None]
    assert room.spare(W, torch.float32) is None
