"""LN tuning: the norm's own parameters, trained as a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.methods.nets import Net, adapted, check_gradients, image, merging_changes_nothing, same
from tests.models import gpt2, llama
from trimtab import LNTuningConfig, PeftModel, get_peft_model
from trimtab.errors import AdapterFileError


def test_the_copy_stands_for_the_norm() -> None:
    model = adapted(LNTuningConfig(target_modules=["norm"]))
    copy = model.get_base_model().norm.ln_tuning_layers["default"]
    plain = Net().double()
    plain.norm.weight.data, plain.norm.bias.data = copy.weight.data, copy.bias.data
    same(model(image()), plain(image()))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_starts_as_the_layer_and_leaves_it_alone(name: str) -> None:
    base = Net().double()
    expected, weight = base(image()), base.get_submodule(name).weight
    before = weight.detach().clone()
    model = get_peft_model(base, LNTuningConfig(target_modules=[name]))
    assert torch.equal(model(image()), expected)
    model(image()).sum().backward()
    assert weight.grad is None
    assert torch.equal(weight, before)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_defaults_are_the_norms(make: object) -> None:
    model = get_peft_model(make(), LNTuningConfig())  # type: ignore[operator]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".ln_tuning_layers.default." in n for n in trained)
    assert len(trained) == (5 if make is llama else 10)


def test_of_two_the_outermost_counts() -> None:
    model = adapted(LNTuningConfig(target_modules=["norm"]))
    alone = model(image())
    model.add_adapter("b", LNTuningConfig(target_modules=["norm"]))
    model.set_adapter(["b", "default"])
    assert torch.equal(model(image()), alone)


class Counted(torch.nn.Module):
    """A batch norm that has seen some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(6)
        self.out = torch.nn.Conv2d(6, 2, 1)
        self.train()
        self.norm(3 * torch.randn(4, 6, 5, 5) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def test_a_copy_of_a_batch_norm_counts_for_itself() -> None:
    """In training the copy's statistics move as a norm's by itself would, and the base's stay where they were."""
    torch.manual_seed(0)
    base = Counted().double()
    plain, before = copy.deepcopy(base), {n: b.clone() for n, b in base.norm.named_buffers()}
    model = adapted(LNTuningConfig(target_modules=["norm"]), base)
    own = model.get_base_model().norm.ln_tuning_layers["default"]
    plain.norm.weight.data, plain.norm.bias.data = own.weight.data, own.bias.data
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        same(model(image()), plain(image()))
    for name, buffer in plain.norm.named_buffers():
        same(getattr(own, name), buffer)
        assert torch.equal(getattr(model.get_base_model().norm.base_layer, name), before[name])
    merging_changes_nothing(model, image())
    check_gradients(model, image())
    with model.disable_adapter():
        off = model(image())
    merged = model.train().merge_and_unload().eval()
    same(merged(image()), plain(image()))
    merged.norm.weight.data.fill_(1), merged.norm.bias.data.zero_()
    same(merged(image()), off)


def test_a_file_without_statistics_says_what_it_lacks(tmp_path) -> None:
    """So it was saved before copies had statistics of their own: the base's are what it was trained with."""
    base = Counted()
    adapted(LNTuningConfig(target_modules=["norm"]), copy.deepcopy(base)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k.endswith(("weight", "bias"))}, path)
    with pytest.raises(
        AdapterFileError, match=r"running_mean.*None of these is trained.*earlier version.*strict=False"
    ):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.warns(UserWarning, match="running_mean"):
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, strict=False)
    own = model.get_base_model().norm.ln_tuning_layers["default"]
    assert all(torch.equal(getattr(own, name), buffer) for name, buffer in base.norm.named_buffers())
    save_file({k: v for k, v in tensors.items() if "bias" not in k and "running" not in k}, path)
    with pytest.raises(AdapterFileError, match="Check that the base model"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
