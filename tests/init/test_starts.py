"""Starts that need something beforehand, in their own terms: what they promise of the model and of the pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import gpt2, llama, tokens
from tests.quantised import net, twin
from trimtab import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from trimtab.init.eva import IncrementalPCA
from trimtab.init.loftq import NF4, quantised

X = tokens(vocabulary=64)


def prepared(start: str, base: Any, **fields: Any) -> LoraConfig:
    fields = {"lora_alpha": 6, "r": 3, **fields}
    if base.config.model_type == "llama":
        fields |= {"target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(init_lora_weights=start, **fields)
    if start == "corda":
        preprocess_corda(base, config, run_model=lambda: base(X))
    elif start == "lora_ga":
        preprocess_loraga(base, config, lambda: base(X, labels=X).loss.backward())
    return config


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_base_and_pair_add_up_and_files_of_plain_loras_come_out(start: str, make: Any, tmp_path: Path) -> None:
    base = make()
    expected = base(X).logits.detach()
    state = {n: p.detach().clone() for n, p in base.named_parameters()}
    fields = {"loftq_config": LoftQConfig()} if start == "loftq" else {}
    model = get_peft_model(base, prepared(start, base, **fields)).eval()
    assert all(p.grad is None for p in base.parameters())
    if start != "loftq":
        assert float((model(X).logits - expected).detach().abs().max()) < 1e-4
    with model.disable_adapter():
        assert torch.equal(model(X).logits, expected)
    if start == "loftq":
        return
    model.save_pretrained(tmp_path / "start")
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(X, labels=X).loss.backward()
    optimiser.step()
    trained = model(X).logits.detach()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "plain")
    assert float((loaded(X).logits - trained).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(make(), tmp_path / "start")
    assert all(torch.equal(p, state[n]) for n, p in model.unload(pristine=True).named_parameters())


def test_nf4_takes_the_nearest_of_its_values() -> None:
    W = torch.randn(5, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q, flat = quantised(W, 4).flatten().tolist(), W.flatten().tolist()
    for at in range(0, len(flat), 64):
        block = flat[at : at + 64]
        scale = max(map(abs, block))
        for w, q in zip(block, Q[at : at + 64], strict=True):
            assert abs(q - scale * min(NF4, key=lambda v: abs(v - w / scale))) < 1e-6
    assert float((quantised(W, 8) - W).abs().max()) <= float(W.abs().max()) / 254 + 1e-12


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_comes_nearer_round_by_round(bits: int) -> None:
    errors = []
    for rounds in (1, 2, 5):
        base = llama()
        W = base.model.layers[0].mlp.down_proj.weight.detach().clone()
        settings = LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
        model = get_peft_model(base, prepared("loftq", base, loftq_config=settings))
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        Q = layer.base_layer.weight.detach()
        errors.append(float((W - Q - layer.get_delta_weight("default")).norm() / (W - quantised(W, bits)).norm()))
    assert errors[0] < 0.95
    assert errors[2] <= errors[0] + 1e-6


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_sizes_of_lora_ga(scale: str) -> None:
    base = llama()
    W = base.model.layers[1].self_attn.q_proj.weight.detach().clone()
    config = prepared("lora_ga", base, lora_ga_config=LoraGAConfig(scale=scale, stable_gamma=4))
    layer = get_peft_model(base, config).get_base_model().model.layers[1].self_attn.q_proj
    s = 6 / 3
    c = {"stable": 16**0.25 / 2, "gd_scale": 1 / s, "unit": 1.0}.get(scale)
    c = float((torch.linalg.svdvals(W)[:3].mean() / s).sqrt()) if c is None else c
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for M in (A @ A.T, B.T @ B):
        assert float((M - c * c * torch.eye(3)).detach().abs().max()) < 1e-4


def test_incremental_pca_is_pca() -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 9, dtype=torch.float64, generator=g) * torch.linspace(0.2, 3, 9, dtype=torch.float64) + 1
    pca = IncrementalPCA(9)
    for batch in X.split((20, 13, 27)):
        pca.update(batch)
    _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert torch.allclose(pca.values, S)
    assert torch.allclose((pca.components * V).sum(1).abs(), torch.ones(9, dtype=torch.float64))  # type: ignore[operator]
    assert torch.allclose(pca.share, S.square() / S.square().sum())


def test_eva_keeps_what_else_there_is() -> None:
    config = LoraConfig(
        r=2, init_lora_weights="eva", eva_config=EvaConfig(tau=0.5), target_modules=["q_proj", "lm_head"]
    )
    model = get_peft_model(llama(), config)
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"]))
    batch: list[dict[str, Tensor]] = [{"input_ids": X}]
    initialize_lora_eva_weights(model, batch)
    assert model.active_adapters == ["default"]
    assert set(model.peft_config) == {"default", "other"}
    assert all(p.requires_grad == (".default." in n) for n, p in model.named_parameters() if "lora_" in n)
    A = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert float((A @ A.T - torch.eye(len(A))).detach().abs().max()) < 1e-5
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        initialize_lora_eva_weights(model, batch, adapter_name="other")


def test_loftq_of_a_quantised_model(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    W = {n: p + 0.05 * torch.randn(p.shape, generator=g) for n, p in twin("bnb-nf4").state_dict().items()}
    save_file(W, tmp_path / "model.safetensors")
    model = get_peft_model(net("bnb-nf4"), LoraConfig(r=2, lora_alpha=6, target_modules=["up"]))
    layer = model.get_base_model().up
    lost = W["up.weight"] - layer.methods["default"][0].site.matrix()
    replace_lora_weights_loftq(model, str(tmp_path), callback=lambda m, n: False)
    assert float(layer.lora_B["default"].weight.detach().abs().max()) == 0
    replace_lora_weights_loftq(model, str(tmp_path))
    U, S, V = torch.linalg.svd(lost)
    best = (U[:, :2] * S[:2]) @ V[:2]
    delta = layer.methods["default"][0].delta().detach()
    assert float((delta - best).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="No bnb LoRA module"):
        replace_lora_weights_loftq(get_peft_model(llama(), LoraConfig()), str(tmp_path))
