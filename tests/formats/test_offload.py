"""Models whose weights accelerate keeps on the CPU or on disk: adapters read, run, merge and save through its hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn

from tests.models import llama, tokens
from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.layer.spelling import weighed

CPU = torch.device("cpu")


def on_cpu(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, CPU)


def on_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder), CPU)


def dispatched(model: nn.Module, folder: Path) -> None:
    """Some of it stays, some is offloaded to the CPU, some to disk."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


PLACES: dict[str, Callable[[nn.Module, Path], None]] = {"cpu": on_cpu, "disk": on_disk, "dispatched": dispatched}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
OPTIONS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
configs = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"], r=2, **options)


def moved(model: PeftModel) -> PeftModel:
    """The adapter after some training."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(tokens()).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@places
@configs
def test_offloaded_equals_plain(place: Callable[..., None], options: dict[str, Any], tmp_path: Path) -> None:
    base = run(llama())
    plain = moved(get_peft_model(llama(), config(**options)))
    wanted = run(plain)

    away = llama()
    place(away, tmp_path / "weights")
    assert away.model.layers[1].self_attn.q_proj.weight.is_meta
    torch.manual_seed(0)
    llama()
    model = moved(get_peft_model(away, config(**options)))
    assert all(not p.is_meta for n, p in model.named_parameters() if "lora_" in n)
    close(run(model), wanted)
    with model.disable_adapter():
        close(run(model), base)

    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    same = plain.get_base_model().model.layers[1].self_attn.q_proj
    close(layer.get_delta_weight("default"), same.get_delta_weight("default"))
    model.merge_adapter()
    close(run(model), wanted)
    assert layer.base_layer.weight.is_meta, "its place between forwards is where it was"
    with model.disable_adapter():
        close(run(model), base)
    close(run(model), wanted)
    model.unmerge_adapter()
    close(run(model), wanted)

    model.save_pretrained(tmp_path / "adapter")
    close(run(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), wanted)
    other = llama()
    place(other, tmp_path / "other")
    close(run(PeftModel.from_pretrained(other, tmp_path / "adapter")), wanted)

    merged = model.merge_and_unload()
    close(run(merged), wanted)
    state = get_state_dict_offloaded_model(merged)
    fresh = llama()
    fresh.load_state_dict(state)
    close(run(fresh), wanted)


@places
def test_unload_gives_back_the_offloaded_model(place: Callable[..., None], tmp_path: Path) -> None:
    base = llama()
    wanted = run(base)
    place(base, tmp_path)
    modules = dict(base.named_modules())
    model = moved(get_peft_model(base, config(init_lora_weights="pissa")))
    model.merge_adapter()
    back = model.unload(pristine=True)
    assert dict(back.named_modules()) == modules
    assert torch.equal(run(back), wanted)


@places
def test_gradients(place: Callable[..., None], tmp_path: Path) -> None:
    """Training goes through the hooks; a method that runs the layer with other weights does so too."""
    plain, away = llama(), llama()
    place(away, tmp_path)
    found = []
    for base in (plain, away):
        torch.manual_seed(0)
        model = moved(get_peft_model(base, config()))
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        model(tokens()).logits.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        y = weighed(layer.stack(["default"]), (x,), {})
        close(y, layer(x))
        found.append((grads, torch.autograd.grad(y.sum(), layer.lora_A["default"].weight)[0]))
    (wanted, first), (grads, second) = found
    assert grads.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(grads[name], gradient)
    close(first, second)


@places
def test_whole_copies_of_offloaded_modules(place: Callable[..., None], tmp_path: Path) -> None:
    """A module that is trained whole is copied with its weights, and saved."""
    base = llama()
    wanted = run(base)
    place(base, tmp_path / "weights")
    options = {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head", "layers.1.input_layernorm"]}
    model = get_peft_model(base, LoraConfig(**options)).eval()
    close(run(model), wanted)
    changed = run(moved(model))
    assert not torch.allclose(changed, wanted, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    close(run(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), changed)
