"""Functions and modules of peft's inside that programs import, against the installed peft's outputs."""

from __future__ import annotations

import importlib
import os
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import trimtab
from tests.models import llama
from tests.parity.alias import find
from tests.parity.pairs import BOTH, quiet

X = torch.tensor([[5, 7, 8, 9], [7, 8, 7, 9], [1, 2, 3, 4], [9, 9, 9, 7]])


def both(path: str, name: str) -> tuple[Any, Any]:
    """(ours, theirs) of a name in one of peft's modules."""
    return find(path, name), getattr(importlib.import_module(path), name)


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("path", "name", "shapes"),
    [
        ("loha.layer", "make_weight", [(4, 2), (2, 5), (4, 2), (2, 5), ()]),
        ("loha.layer", "make_weight_cp", [(2, 2, 3, 3), (2, 4), (2, 5), (2, 2, 3, 3), (2, 4), (2, 5), ()]),
        ("lokr.layer", "make_weight_cp", [(2, 2, 3, 3), (2, 4), (2, 5)]),
        ("lokr.layer", "make_kron", [(2, 3), (4, 5)]),
        ("lokr.layer", "make_kron", [(2, 3), (4, 5, 3, 3)]),
        ("c3a.utils", "get_circulant_fast", [(2, 3, 4)]),
        ("c3a.utils", "BlockCircularConvolution", [(5, 12), (2, 3, 4)]),
        ("loha.layer", "HadaWeight", [(4, 2), (2, 5), (4, 2), (2, 5), ()]),
        ("loha.layer", "HadaWeightCP", [(2, 2, 3, 3), (2, 4), (2, 5), (2, 2, 3, 3), (2, 4), (2, 5), ()]),
        ("randlora.layer", "UniqueBaseGrad", [(4, 1, 6), (4, 3), (3, 6)]),
        ("adaption_prompt.utils", "llama_rotate_half", [(2, 3, 8)]),
    ],
)
def test_pieces_of_formulas(path: str, name: str, shapes: list[tuple[int, ...]]) -> None:
    given = numbers(*shapes)
    ours, theirs = (getattr(f, "apply", f)(*given) for f in both(f"peft.tuners.{path}", name))
    torch.testing.assert_close(ours, theirs)


def test_factorization() -> None:
    ours, theirs = both("peft.tuners.lokr.layer", "factorization")
    pairs = [(n, f) for n in (1, 7, 12, 128, 250, 360) for f in (-1, 4, 8, 5, 16)]
    assert [ours(*p) for p in pairs] == [theirs(*p) for p in pairs]


@pytest.mark.parametrize("fields", [{}, {"use_cayley_neumann": False}, {"coft": True, "eps": 0.2}])
def test_oft_rotation(fields: dict[str, Any]) -> None:
    modules = [module(3, 6, 4, 12, **fields) for module in both("peft.tuners.oft.layer", "OFTRotationModule")]
    weight, x = numbers((3, 6), (5, 12))
    for module in modules:
        module.weight.data = 0.1 * weight
    ours, theirs = modules
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.get_weight(), theirs.get_weight())


@pytest.mark.parametrize(
    "fields", [{}, {"orth": False}, {"mag_a": False}, {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5}]
)
def test_psofts_matrix(fields: dict[str, Any]) -> None:
    ours, theirs = (layer(4, **fields) for layer in both("peft.tuners.psoft.layer", "OrthLayer"))
    assert torch.equal(ours.get_matrix(), torch.eye(4))
    held = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.data = numbers(tuple(parameter.shape))[0] * 0.1
        held[name].data = parameter.data.clone()
    x = numbers((3, 4))[0]
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("family", ["db1", "db3", "sym4", "coif1"])
def test_wavelets(family: str) -> None:
    ours, theirs = (f(family) for f in both("peft.tuners.waveft.wavelet", "Wavelet"))
    for name in ("dec_lo", "dec_hi", "rec_lo", "rec_hi"):
        torch.testing.assert_close(torch.tensor(getattr(ours, name)), torch.tensor(getattr(theirs, name)))
    assert (ours.dec_len, ours.rec_len) == (theirs.dec_len, theirs.rec_len)
    known, others = both("peft.tuners.waveft.constants", "WAVELET_REDUCTIONS")
    assert known[family] == others[family]
    low, *details = numbers((2, 7, 8), (2, 7, 8), (2, 7, 8), (2, 7, 8))
    outputs = []
    for library in (0, 1):
        details_of = both("peft.tuners.waveft.waverec2d", "WaveletDetailTuple2d")[library]
        waverec2d = both("peft.tuners.waveft.layer", "waverec2d")[library]
        outputs.append(waverec2d((low, details_of(*details)), family))
    torch.testing.assert_close(*outputs)


def test_osf_and_adamss() -> None:
    (W,) = numbers((6, 4))
    parts = [f(W, 2) for f in both("peft.tuners.osf.utils", "decompose_weight_matrix")]
    for name, value in parts[1].items():
        assert getattr(parts[0][name], "shape", parts[0][name]) == getattr(value, "shape", value)
        assert isinstance(value, nn.Parameter) == isinstance(parts[0][name], nn.Parameter)
    ours = parts[0]
    whole = (ours["U_high"] * ours["S_high"]) @ ours["V_high"] + (ours["U_low"] * ours["S_low"]) @ ours["V_low"]
    torch.testing.assert_close(whole, W)
    for project in both("peft.tuners.osf.utils", "project_gradient_to_orthogonal_space"):
        for name, seed in (("U_low", (6, 2)), ("V_low", (2, 4))):
            parts[1][name].grad = numbers(seed)[0]
        project(parts[1])
        ours[f"{project.__module__}"] = [parts[1][n].grad.clone() for n in ("U_low", "V_low")]
    torch.testing.assert_close(*[v for k, v in ours.items() if "." in k])
    (rows,) = numbers((20, 4))
    labels = [f(rows, 3, 10) for f in both("peft.tuners.adamss.utils", "clustering_Z")]
    assert torch.equal(labels[0][0], labels[1][0].to(labels[0][0]))
    assert labels[0][1] == labels[1][1]
    places = [f(labels[0][0]) for f in both("peft.tuners.adamss.utils", "seg_locations")]
    assert {k: v.tolist() for k, v in places[0].items()} == {k: v.tolist() for k, v in places[1].items()}
    assert len({tuple(f(4)) for f in both("peft.tuners.adamss.utils", "get_trainable_subspaces")}) == 1
    (M,) = numbers((2, 3, 8, 5))
    (V, U), (V_, U_) = (f(M, 5, "cpu") for f in both("peft.tuners.adamss.utils", "slice_pca"))
    assert (V.shape, U.shape) == (V_.shape, U_.shape)
    torch.testing.assert_close((U @ V).abs(), (U_ @ V_).abs(), atol=1e-4, rtol=1e-4)


def test_budgets_of_adalora() -> None:
    fields = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 10, "deltaT": 2}
    found = []
    for which, library in enumerate(BOTH):
        config = library.AdaLoraConfig(target_modules=["q_proj"], **fields)
        model = quiet(library.get_peft_model, llama(), config).train()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = numbers(tuple(parameter.shape))[0]
        allocator = both("peft.tuners.adalora", "RankAllocator")[which](model, model.peft_config["default"], "default")
        schedule = [allocator.budget_schedule(step) for step in range(1, 12)]
        torch.manual_seed(0)
        model(X, labels=X).logits.square().sum().backward()
        left = allocator.update_and_allocate(model, 2)
        found.append((schedule, left, allocator.update_and_allocate(model, 3)))
    assert found[0] == found[1]
    assert sum(map(sum, found[0][1][1].values())) == found[0][1][0]


def test_routers() -> None:
    configs = [library.PolyConfig(n_tasks=3, n_skills=4, n_splits=2) for library in BOTH]
    ours, theirs = (f(c).eval() for f, c in zip(both("peft.tuners.poly.router", "get_router"), configs, strict=True))
    ours.reset()
    theirs.module_logits.data = ours.module_logits.data = numbers((3, 8))[0]
    torch.testing.assert_close(ours(torch.tensor([0, 2]), X), theirs(torch.tensor([0, 2]), X))
    for router in (ours, theirs):
        with pytest.raises(ValueError, match="task_ids should not be None"):
            router(None, X)
    soft = [f(2.0)(numbers((2, 3))[0]) for f in both("peft.tuners.xlora.classifier", "TemperatureScaledSoftmax")]
    torch.testing.assert_close(*soft)


@pytest.mark.parametrize("path", ["boft", "oft"])
def test_dropout_of_rotations(path: str) -> None:
    (x,) = numbers((2, 8, 3, 3) if path == "boft" else (8, 3, 3))
    for layer in both(f"peft.tuners.{path}.layer", "MultiplicativeDropoutLayer"):
        y, eye = layer(0.5).train()(x), torch.eye(3)
        replaced = (y == eye).flatten(-2).all(-1)
        assert torch.equal(y[~replaced], x[~replaced])
        assert int(replaced.sum()) == 4
        assert torch.equal(layer(0.5).eval()(x), x)


def test_offsets_of_alora() -> None:
    names = ["first", "plain", "second", "second"]
    for given in (None, names):
        found = []
        for which, library in enumerate(BOTH):
            configs = {
                "first": library.LoraConfig(alora_invocation_tokens=[7, 8]),
                "plain": library.LoraConfig(),
                "second": library.LoraConfig(alora_invocation_tokens=[9]),
            }
            offsets = both("peft.tuners.lora.variants", "calculate_alora_offsets")[which]
            found.append([offsets(configs, n, X, adapter_names=given) for n in ("first", "plain")])
        assert found[0] == found[1]
    calls: list[list[Any]] = [[], []]
    for which, library in enumerate(BOTH):
        for tokens in ([7, 8], None):
            config = library.LoraConfig(
                target_modules=["q_proj"], alora_invocation_tokens=tokens, task_type="CAUSAL_LM"
            )
            model = quiet(library.get_peft_model, llama(), config)
            forward, generate, relevant = (
                both("peft.tuners.lora.variants", name)[which]
                for name in (
                    "get_alora_offsets_for_forward",
                    "get_alora_offsets_for_generate",
                    "is_alora_relevant_in_batch",
                )
            )
            calls[which] += [
                forward(model, X, use_cache=False),
                forward(model, None),
                generate(model, X, num_beams=2),
                relevant(model),
                relevant(model, ["__base__"] * 4),
            ]
    assert calls[0] == calls[1]


def test_masks_and_caches() -> None:
    model = llama()
    for mask in (torch.tensor([[0, 1, 1, 1]]), None):
        ours, theirs = (
            f(
                model,
                model_input=X[:1],
                attention_mask=mask,
                past_key_values=DynamicCache(),
                cache_position=torch.arange(4),
                batch_size=1,
                sequence_length=4,
                position_ids=torch.arange(4)[None],
            )
            for f in both("peft.utils.other", "create_attention_mask")
        )
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    layers = tuple(numbers((2, 3, 2, 5, 4), (2, 3, 2, 5, 4)))
    for name in ("bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value"):
        torch.testing.assert_close(*(f(layers) for f in both("peft.utils.constants", name)))
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta"}
    for move in both("peft.utils.integrations", "map_cache_to_layer_device_map"):
        cache = DynamicCache()
        for index in (0, 1):
            cache.update(*numbers((1, 1, 2, 4), (1, 1, 2, 4)), index)
        move(model, cache)
        assert [layer.keys.device.type for layer in cache.layers] == ["meta", "meta"]


def test_modules_trained_whole() -> None:
    for which, library in enumerate(BOTH):
        model = llama()
        give = both("peft.utils.other", "set_additional_trainable_modules")[which]
        config = library.LoraConfig(modules_to_save=["lm_head"])
        give(model, config, None, "default")
        assert model.lm_head.active_adapters == ["default"]
        assert model.lm_head.modules_to_save["default"].weight.requires_grad


def test_starts_from_data() -> None:
    found: list[list[Any]] = [[], []]
    for which, library in enumerate(BOTH):
        config = library.LoraConfig(
            target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=library.LoraGAConfig()
        )
        model = llama()
        get, estimate = (
            both("peft.tuners.lora.loraga", name)[which] for name in ("get_target_modules", "estimate_gradients")
        )
        estimate(model, config, lambda model=model: model(X, labels=X).loss.backward())
        for name, layer in get(model, config):
            found[which] += [name, layer._peft_loraga_grad]
    assert found[0][::2] == found[1][::2]
    torch.testing.assert_close(found[0][1::2], found[1][1::2])
    given = {"a": 1, "b": 2, "c": 1, "d": 3, "e": 2}
    ours, theirs = (f(given) for f in both("peft.tuners.lora.eva", "find_equal_values"))
    assert ours == theirs


def test_llama_adapters_attention() -> None:
    names = ["a.adaption_prompt", "b.weight", "x.adaption_gate", "adaption_prompt.default"]
    ours, theirs = both("peft.tuners.adaption_prompt.utils", "is_adaption_prompt_trainable")
    assert [ours(n) for n in names] == [theirs(n) for n in names]
    known, others = both("peft.tuners.adaption_prompt.config", "TRANSFORMERS_MODEL_CONFIG")
    for model, config in others.items():
        assert known[model][1:] == tuple(config)[1:]
    for which, library in enumerate(BOTH):
        prepare = both("peft.tuners.adaption_prompt.config", "prepare_config")[which]
        config = library.AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
        assert prepare(config, llama()).target_modules == "self_attn"
    model = llama()
    attention, (x,) = model.model.layers[0].self_attn, numbers((2, 4, 16))
    turns = model.model.rotary_emb(x, torch.arange(4)[None])
    states = [
        f(attention, hidden_states=x, position_embeddings=turns, past_key_values=None)
        for f in both("peft.tuners.adaption_prompt.utils", "llama_compute_query_states")
    ]
    torch.testing.assert_close(*states)


def test_environment_and_blocks() -> None:
    for patch in both("peft.tuners.boft.layer", "patch_environment"):
        with patch(of_a_test=2):
            assert os.environ["OF_A_TEST"] == "2"
        assert "OF_A_TEST" not in os.environ
    blocks = numbers((2, 3, 4, 4))[0]
    whole = find("peft.tuners.boft.layer", "FastBlockDiag").apply(blocks)
    assert torch.equal(whole[1], torch.block_diag(*blocks[1]))


def test_variants_are_formulas() -> None:
    config = trimtab.LoraConfig(target_modules=["q_proj"], use_dora=True)
    layer = trimtab.get_peft_model(llama(), config).base_model.model.model.layers[0].self_attn.q_proj
    (method,) = layer.methods["default"]
    assert isinstance(method, find("peft.tuners.lora.variants", "DoraLinearVariant"))
    assert isinstance(method, find("peft.tuners.lora.layer", "LoraVariant"))
    assert not isinstance(method, find("peft.tuners.lora.variants", "KasaLinearVariant"))
    assert issubclass(peft.tuners.lora.variants.DoraLinearVariant, peft.tuners.lora.layer.LoraVariant)
