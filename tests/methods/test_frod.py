"""FRoD against U (diag(l) + S) Vᵀ in plain loops, what U, V and l start from, and files with and without V."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.methods.formulas import product, transposed
from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import gpt2, llama, tokens
from trimtab import FrodConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from trimtab.files.store import load_peft_weights

ALL = ["q_proj", "up_proj", "down_proj"]


def full() -> Net:
    """`Net` with a linear layer of as many directions as inputs."""
    net = Net()
    net.linear = nn.Linear(12, 17)
    return net


def test_formula() -> None:
    model = adapted(FrodConfig(target_modules=["linear"], sparse_rate=0.1), full())
    layer = model.get_base_model().linear
    V, (rows, columns) = (
        model.base_model.get_buffer(f"{name}.default.linear") for name in ("frod_V", "frod_s_indices")
    )
    C = torch.diag(layer.frod_lambda_l["default"]).detach()
    assert len(rows) == 14
    for i, j, s in zip(rows.tolist(), columns.tolist(), layer.frod_lambda_s_values["default"].tolist(), strict=True):
        assert i != j
        C[i, j] += s
    U = layer.frod_U["default"]
    same(merged(model, "linear"), product(product(numbers(U), numbers(C)), transposed(numbers(V))), 1e-9)
    same(U.norm(dim=0), torch.ones(12))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_v_diagonalises_what_its_layers_share() -> None:
    """Of two layers the uncentred Gram matrices are both diagonal in it: that is the generalised decomposition."""
    model = get_peft_model(llama().double(), FrodConfig(target_modules=["up_proj"]))
    V = model.base_model.get_buffer("frod_V.default.mlp_up_proj")
    inverse = torch.linalg.inv(V)
    for layer in model.get_base_model().model.layers:
        W = layer.mlp.up_proj.base_layer.weight
        B = inverse @ (W.T @ W) @ inverse.T
        same(B, torch.diag(layer.mlp.up_proj.frod_lambda_l["default"] ** 2), 1e-4)


def test_directions_that_a_weight_lacks_stay_out() -> None:
    model = get_peft_model(Net().double(), FrodConfig(target_modules=["linear"]))  # 12 inputs, 5 outputs
    layer = model.get_base_model().linear
    assert int((layer.frod_lambda_l["default"] > 0).sum()) == 5
    assert torch.equal(model(image()), Net().double()(image()))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_files_with_and_without_projections(saved: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(FrodConfig(target_modules=ALL, save_projection=saved, sparse_rate=0.2), llama())
    model.save_pretrained(tmp_path)
    assert any("frod_V" in key for key in load_peft_weights(tmp_path)) == saved
    assert not any("frod_U" in key for key in load_peft_weights(tmp_path))
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage and saved)
    assert torch.equal(loaded(tokens(vocabulary=64)).logits, model(tokens(vocabulary=64)).logits)


@pytest.mark.parametrize("how", ["state dict", "load_adapter"])
def test_u_follows_another_v(how: str, tmp_path: Path) -> None:
    """A file's V need not be the one we would find: here its directions are in another order."""
    model = adapted(FrodConfig(target_modules=["c_attn"], sparse_rate=0.0), gpt2())
    y = model(tokens(vocabulary=64)).logits
    state = get_peft_model_state_dict(model)
    order = torch.randperm(16)
    changed = {k: v[:, order] if "frod_V" in k else v[order] if "lambda_l" in k else v for k, v in state.items()}
    other = get_peft_model(gpt2().double(), FrodConfig(target_modules=["c_attn"], sparse_rate=0.0)).eval()
    if how == "state dict":
        set_peft_model_state_dict(other, changed)
    else:
        set_peft_model_state_dict(model, changed)
        model.save_pretrained(tmp_path)
        other.load_adapter(str(tmp_path), "default")
    same(other(tokens(vocabulary=64)).logits, y, 1e-6)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        FrodConfig(sparse_rate=1.1)
    net = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(n, 5)}) for n in (3, 4)])
    with pytest.raises(ValueError, match=r"'fc' share one V, but have \[3, 4\] inputs"):
        get_peft_model(net, FrodConfig(target_modules=["fc"]))
    model = get_peft_model(llama(), FrodConfig(target_modules=ALL))
    with pytest.raises(ValueError, match="saved for all adapters or none"):
        model.add_adapter("b", FrodConfig(target_modules=ALL, save_projection=False))
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        model.add_adapter("b", FrodConfig(target_modules=ALL, projection_prng_key=1))
