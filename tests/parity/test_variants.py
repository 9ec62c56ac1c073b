"""LoRA's variants against PEFT: names, starts, outputs, gradients, merges, files, what a generation adapts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab
from tests.models import llama
from tests.parity.models import batch, build
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    gradients,
    near,
    quiet,
    run,
    spoken,
    stir,
    trainable,
    weights_file,
)

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": ("KasaConfig", {"beta": 0.2, "gamma": 0.3})},
    "kasa_random": {"kasa_config": ("KasaConfig", {}), "init_lora_weights": False, "use_rslora": True},
    "bd_a": {"use_bdlora": ("BdLoraConfig", {"nblocks": 2, "target_modules_bd_a": PROJECTIONS})},
    "bd_b": {"use_bdlora": ("BdLoraConfig", {"nblocks": 2, "target_modules_bd_b": ["q_proj"], "match_strict": False})},
    "mica": {"init_lora_weights": "mica"},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {"num_samples": 3, "sample_scaler": 0.0})},
    "qalora": {"use_qalora": True},
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 3, "scale": 1.5})},
    "velora_once": {"velora_config": ("VeloraConfig", {"init_type": "batch_average_once", "num_groups": 4})},
    "velora_random": {"velora_config": ("VeloraConfig", {"init_type": "random", "num_groups": 5})},
    "alora": {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"},
}
CASES |= {f"{name}_bias": {**CASES[name], "lora_bias": True} for name in CASES if name not in ("mica", "kasa_random")}
every = pytest.mark.parametrize("case", CASES)
IDS = torch.tensor([[5, 7, 8, 9, 10, 11], [7, 8, 9, 7, 8, 12], [3, 4, 5, 6, 9, 10], [9, 10, 11, 12, 7, 8]])


def config_of(library: Any, case: str, **more: Any) -> Any:
    given = {k: getattr(library, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in CASES[case].items()}
    return quiet(library.LoraConfig, r=4, lora_alpha=6, target_modules=PROJECTIONS, **given, **more)


def pair(case: str) -> list[Any]:
    """(ours, theirs), holding the same numbers, stirred."""
    models = [quiet(library.get_peft_model, build("llama"), config_of(library, case)) for library in BOTH]
    stir(models[1])
    held, given = (dict([*m.named_parameters(), *m.named_buffers()]) for m in models)
    with torch.no_grad():
        for name, tensor in given.items():
            if "lora_" in name:
                held[name].copy_(tensor)
    return models


@every
def test_names_and_starts(case: str) -> None:
    ours, theirs = (quiet(library.get_peft_model, build("llama"), config_of(library, case)) for library in BOTH)
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert held[name].shape == parameter.shape
        if "base_layer" in name:
            near(held[name], parameter, 1e-4)  # what KaSA leaves of the base
        if case == "mica" and "lora_B" in name:
            near(held[name] @ held[name].T, parameter @ parameter.T, 1e-4)
        elif "lora_B" in name and case != "kasa_random":
            assert torch.equal(held[name], parameter)


@every
def test_outputs_gradients_and_merges(case: str) -> None:
    ours, theirs = pair(case)
    if case.startswith("alora"):
        near(ours(IDS).logits, theirs(IDS).logits)
        for model in (ours, theirs):
            with pytest.raises((ValueError, NotImplementedError), match="merg"):
                quiet(model.merge_and_unload)
        return
    near(run(ours.eval(), "llama"), run(theirs.eval(), "llama"))
    found, expected = (gradients(m.eval(), "llama") for m in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        near(found[key], gradient)
    if case.endswith("_bias"):  # PEFT merges none into a layer without a bias
        expected = run(theirs, "llama")
        with pytest.raises(RuntimeError, match="lora_bias"):
            quiet(theirs.merge_and_unload)
        near(run(quiet(ours.merge_and_unload), "llama"), expected)
        return
    near(run(quiet(ours.merge_and_unload), "llama"), run(quiet(theirs.merge_and_unload), "llama"))


@every
@pytest.mark.parametrize("writer", [0, 1], ids=["ours", "theirs"])
def test_files_both_ways(case: str, writer: int, tmp_path: Path) -> None:
    both = pair(case)
    for model, folder in zip(both, "01", strict=True):
        quiet(model.eval().save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    all_near(mine, yours)
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    reader = BOTH[1 - writer]
    read = quiet(reader.PeftModel.from_pretrained, build("llama"), str(tmp_path / str(writer)))
    near(read.eval()(IDS).logits, both[writer](IDS).logits)


def test_penalty_of_kasa() -> None:
    ours, theirs = pair("kasa")
    near(ours.base_model.penalties()["default"], theirs.base_model._get_kasa_loss("default"))


@pytest.mark.parametrize("case", ["velora", "velora_once", "velora_random"])
def test_what_velora_trains_on(case: str) -> None:
    ours, theirs = pair(case)
    for ids in (IDS, IDS + 3):
        for model in (ours.train(), theirs.train()):
            model.zero_grad()
            model(ids).logits.square().mean().backward()
        found = dict(ours.named_parameters())
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                near(found[key].grad, parameter.grad)
        held = dict(ours.named_buffers())
        for key, value in theirs.named_buffers():
            if "lora_" in key:
                near(held[key], value)


def sampled(library: Any, **fields: Any) -> tuple[Any, Any]:
    """(a layer that draws its A, the model): a linear map of 6 features of rank 3, moved off its start."""
    torch.manual_seed(0)
    settings = library.MontecloraConfig(num_samples=3, sample_scaler=0.5, kl_loss_weight=2.0, **fields)
    config = library.LoraConfig(r=3, target_modules=["0"], monteclora_config=settings)
    model = quiet(library.get_peft_model, torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)), config)
    layer = model.get_submodule("base_model.model.0")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
        layer.lora_monteclora_sampler["default"].std_prior.copy_(torch.tensor([0.1, 0.5, 0.9]))
        layer.lora_monteclora_sampler["default"].expert_weights_prior.copy_(torch.tensor([0.2, 1.0, 1.4]))
    return layer, model.train()


def test_what_monteclora_draws() -> None:
    """Equal in distribution: the variance of each row of A, and the mixture's weights."""
    found = []
    for library in BOTH:
        layer, model = sampled(library)
        start, x, seen, weights = layer.base_layer.weight, torch.eye(6), [], []
        A, inverse = layer.lora_A["default"].weight, torch.linalg.pinv(layer.lora_B["default"].weight)
        with torch.no_grad():
            for _ in range(2000):
                seen.append(inverse @ (model(x).T - start) / layer.scaling["default"] - A)
                weights.append(layer.lora_monteclora_sampler["default"].expert_weights.clone())
        logs = torch.stack(weights).log()
        spread = (logs[:, 1:] - logs[:, :1]).std(0), (logs[:, 1:] - logs[:, :1]).mean(0)
        found.append((torch.stack(seen).square().mean((0, 2)), *spread))
    for ours, theirs in zip(*found, strict=True):
        near(ours / theirs.abs(), theirs.sign(), 0.15)


def test_penalty_of_monteclora() -> None:
    """PEFT's divergence of the weights has a wrong sign: here, where the others are zero, it is negative."""
    losses = []
    for library in BOTH:
        layer, model = sampled(library, use_entropy=True)
        with torch.no_grad():
            layer.lora_monteclora_sampler["default"].std_prior.zero_()
        tuner = model.base_model
        losses.append(tuner.penalties()["default"] if library is trimtab else tuner._get_monteclora_loss("default"))
    alpha = torch.tensor([0.2, 1.0, 1.4]).exp()
    exact = torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (alpha, torch.full((3,), 0.1))))
    near(losses[0], 2 * exact + 1 / 3)
    assert losses[1] < 0


def test_what_alora_adapts_while_generating() -> None:
    seen: list[list[Any]] = []
    for model in pair("alora"):
        layer, mine = model.base_model.model.model.layers[0].self_attn.q_proj, []
        layer.register_forward_hook(
            lambda m, a, y, mine=mine: mine.append(((y - m.base_layer(a[0])).abs().amax(-1) > 1e-7).tolist())
        )
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
        out = model.eval().generate(input_ids=IDS, **options)
        seen.append([mine, out.tolist()])
    assert seen[0] == seen[1]
    assert seen[0][0][0][0] == [False, True, True, True, True, True]


def test_the_base_below_kasa_is_whole() -> None:
    """PEFT truncates it for good, and so for other adapters, which it refuses, and for `disable_adapter`."""
    x = IDS
    for library, whole in zip(BOTH, (True, False), strict=True):
        model = quiet(library.get_peft_model, llama(), config_of(library, "kasa"))
        with model.disable_adapter():
            assert torch.equal(model(x).logits, llama()(x).logits) == whole
        if library is trimtab:
            model.add_adapter("plain", trimtab.LoraConfig(target_modules=["q_proj"]))
            model.set_adapter("plain")
            assert torch.equal(model(x).logits, llama()(x).logits)
        else:
            with pytest.raises(ValueError, match="KaSA cannot be combined"):
                model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"]))


def test_variants_that_do_not_go_together() -> None:
    for library in BOTH:
        with pytest.raises(ValueError, match=r"variant combination: \('kasa_config', 'use_dora'\)"):
            quiet(library.get_peft_model, llama(), config_of(library, "kasa", use_dora=True))
        for wanted, blocks, message in (
            (["k_proj"], 2, "matches neither A nor B"),
            (["q_proj", "v_proj"], 3, "divisible by"),
        ):
            settings = library.BdLoraConfig(nblocks=blocks, target_modules_bd_a=wanted)
            config = library.LoraConfig(r=4, use_bdlora=settings)
            with pytest.raises(ValueError, match=message):
                quiet(library.get_peft_model, llama(), config)


@pytest.mark.parametrize("target", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_tied_layers(target: list[str], tmp_path: Path) -> None:
    """PEFT keeps the pair as two parameters on one storage, and its merge adds their update twice."""
    fields = {"target_modules": target, "r": 4, "lora_alpha": 6, "ensure_weight_tying": True}
    theirs, ours = (
        quiet(lib.get_peft_model, build("llama_tied"), quiet(lib.LoraConfig, **fields)) for lib in (peft, trimtab)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name and "lm_head" not in name:  # the head's are views of the embedding's
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    for model, folder in ((theirs, "1"), (ours, "0")):
        quiet(model.eval().save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    adapted = {k: v.shape for k, v in yours.items() if "lora_" in k}
    assert {k: v.shape for k, v in mine.items() if "lora_" in k} == adapted
    read = quiet(trimtab.PeftModel.from_pretrained, build("llama_tied"), str(tmp_path / "1")).eval()
    near(read(IDS).logits, theirs(IDS).logits)
    quiet(read.save_pretrained, str(tmp_path / "2"))
    again = quiet(peft.PeftModel.from_pretrained, build("llama_tied"), str(tmp_path / "2")).eval()
    near(again(IDS).logits, theirs(IDS).logits)
    expected = theirs(IDS).logits
    near(quiet(read.merge_and_unload)(IDS).logits, expected)
    assert float((quiet(theirs.merge_and_unload)(IDS).logits - expected).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "saved"),
    [("llama_tied", "lm_head"), ("llama_tied", "embed_tokens"), ("gpt2", "lm_head")],
)
def test_tied_copies(name: str, saved: str, tmp_path: Path) -> None:
    """A module that is trained whole, and those tied to it: one parameter, in the file under each of their names."""
    target = {"llama_tied": "q_proj", "gpt2": "c_attn"}[name]
    fields = {"target_modules": [target], "modules_to_save": [saved], "ensure_weight_tying": True}
    ours, theirs = (quiet(lib.get_peft_model, build(name), quiet(lib.LoraConfig, **fields)) for lib in BOTH)
    assert trainable(ours) == trainable(theirs)
    stir(theirs)
    copy_state(theirs, ours)
    near(run(ours.eval(), name), run(theirs.eval(), name))
    found, expected = (gradients(m, name, train=False) for m in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        near(found[key], gradient)
    for model, folder in zip((ours, theirs), "01", strict=True):
        quiet(model.save_pretrained, str(tmp_path / folder))
    all_near(*(weights_file(tmp_path / folder) for folder in "01"))
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    for reader, folder in zip(BOTH, "10", strict=True):
        read = quiet(reader.PeftModel.from_pretrained, build(name), str(tmp_path / folder))
        near(run(read.eval(), name), run(theirs, name))
    with torch.no_grad():  # still one after a change of format, a copy and a step
        again = copy.deepcopy(ours).double().float()
        next(p for n, p in again.named_parameters() if "modules_to_save" in n).mul_(2)
    parts = {p.data_ptr() for n, p in again.named_parameters(remove_duplicate=False) if "modules_to_save" in n}
    assert len(parts) == 1
    expected = run(ours, name)
    whole = quiet(ours.merge_and_unload)
    near(run(whole, name), expected)
    assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight


@pytest.mark.parametrize(("name", "saved"), [("t5", "lm_head"), ("t5", "shared"), ("gpt2", "wte")])
def test_tied_copies_that_peft_has_not(name: str, saved: str) -> None:
    """PEFT gives T5's embeddings a copy of the head, and ties nothing where the embedding is named."""
    fields = {"target_modules": ["q", "c_attn"], "modules_to_save": [saved], "ensure_weight_tying": True}
    ours, theirs = (quiet(lib.get_peft_model, build(name), quiet(lib.LoraConfig, **fields)) for lib in BOTH)
    if saved == "lm_head":
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(theirs, name)
    else:
        assert theirs.get_input_embeddings().weight is not theirs.get_output_embeddings().weight
    assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    stir(ours)
    expected = run(ours.eval(), name)
    near(run(quiet(ours.merge_and_unload), name), expected)


def test_a_file_whose_tied_layers_differ(tmp_path: Path) -> None:
    """PEFT's fall apart on half-precision bases."""
    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    theirs = quiet(peft.get_peft_model, build("llama_tied", torch.bfloat16), peft.LoraConfig(**fields))
    stir(theirs)
    quiet(theirs.save_pretrained, str(tmp_path))
    with pytest.raises(ValueError, match="not what the file has for the layer that is tied to it"):
        quiet(trimtab.PeftModel.from_pretrained, build("llama_tied"), str(tmp_path))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_that_are_repeated(name: str, tmp_path: Path) -> None:
    """PEFT merges the updates of repeated layers into the one weight they share."""
    fields = {"target_modules": ["q_proj", "query", "value"], "r": 4, "layer_replication": [(0, 2), (1, 2)]}
    ours, theirs = (quiet(lib.get_peft_model, build(name), quiet(lib.LoraConfig, **fields)) for lib in BOTH)
    stir(theirs)
    assert trainable(ours) == trainable(theirs)
    with torch.no_grad():
        held = dict(ours.named_parameters())
        for key, parameter in theirs.named_parameters():
            held[key].copy_(parameter)
    expected = run(theirs.eval(), name)
    near(run(ours.eval(), name), expected)
    for model, folder in ((ours, "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    for folder in "01":
        for library in BOTH:
            read = quiet(library.PeftModel.from_pretrained, build(name), str(tmp_path / folder))
            near(run(read.eval(), name), expected)
    near(run(quiet(ours.merge_and_unload), name), expected)
    assert float((run(quiet(theirs.merge_and_unload), name) - expected).detach().abs().max()) > 0.1


def test_nothing_is_said_of_layers_that_are_repeated() -> None:
    """They share their weights because that was asked for; a tied embedding is told as ever."""
    fields = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}
    for library in BOTH:
        assert spoken(library.get_peft_model, build("llama"), library.LoraConfig(**fields)) == []
        wider = library.LoraConfig(**{**fields, "target_modules": ["q_proj", "embed_tokens"]})
        assert [t[:40] for t in spoken(library.get_peft_model, build("llama_tied"), wider)] == [
            "Model has `tie_word_embeddings=True` and"
        ]


@pytest.mark.parametrize(("general", "k"), [(0, 1), (0, 2), (2, 3)])
def test_arrow(general: int, k: int, tmp_path: Path) -> None:
    paths = []
    for i in range(3 + general):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=PROJECTIONS)
        model = quiet(peft.get_peft_model, build("llama"), config)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(std=0.3)
                parameter[(slice(0, 1), ...) if len(parameter) == 4 else (..., slice(0, 1))] *= 8  # PEFT iterates
        quiet(model.save_pretrained, str(tmp_path / str(i)))
        paths.append(str(tmp_path / str(i)))
    made = []
    for library in BOTH:
        config = library.ArrowConfig(top_k=k, router_temperature=0.7, use_gks=bool(general))
        made.append(quiet(library.create_arrow_model, build("llama"), paths[:3], config, paths[3:] or None).eval())
    ours, theirs = made
    assert list(ours.peft_config) == list(theirs.peft_config)
    assert ours.active_adapters == theirs.active_adapters
    expected = theirs(IDS).logits
    near(ours(IDS).logits, expected, 1e-4)
    assert float((ours(IDS).logits - build("llama")(IDS).logits).detach().abs().max()) > 0.1
    for model in made:
        with pytest.raises((RuntimeError, ValueError), match="merge"):
            quiet(model.merge_and_unload)
    quiet(ours.save_pretrained, str(tmp_path / "ours"))
    assert weights_file(tmp_path / "ours" / "task_0").keys() == weights_file(tmp_path / "0").keys()
    ours.delete_adapter("task_1")
    with pytest.raises(ValueError, match=r"not there: \['task_1'\]"):
        ours(IDS)


def test_the_routers_config_is_one_of_its_own(tmp_path: Path) -> None:
    """Of the first adapter it has the layers and the rank, whatever else that says; the adapters' scales act."""
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
        "revision": "x",
    }
    for i in range(2):
        torch.manual_seed(i)
        model = quiet(peft.get_peft_model, build("llama"), peft.LoraConfig(target_modules=["q_proj"], **fields))
        stir(model)
        quiet(model.save_pretrained, str(tmp_path / str(i)))
    paths = [str(tmp_path / str(i)) for i in range(2)]
    made = [quiet(lib.create_arrow_model, build("llama"), paths, lib.ArrowConfig(top_k=1)) for lib in BOTH]
    own = [model.peft_config["arrow_router"].to_dict() for model in made]
    for config in own:
        config.pop("arrow_config")
        config.pop("peft_version", None)
    assert own[0] == own[1]
    assert own[0]["task_type"] is None
    assert not own[0]["inference_mode"]
    near(made[0](IDS).logits, made[1](IDS).logits, 1e-4)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_penalty_that_is_added_by_hand(labelled: bool) -> None:
    """PEFT's users add it themselves; ours is in the model's loss, and what is left of it is nothing then."""
    totals = []
    for library in (trimtab, peft):
        config = library.LoraConfig(target_modules=["q_proj"], r=4, kasa_config=library.KasaConfig(beta=0.1, gamma=0.1))
        torch.manual_seed(0)
        model = quiet(library.get_peft_model, build("llama"), config).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        ids = batch("llama")["input_ids"]
        assert model._get_kasa_loss() > 0.1
        loss = model(ids, labels=ids).loss if labelled else model(ids).logits.square().mean()
        total = loss + model._get_kasa_loss()
        assert model._get_kasa_loss("unknown") == model._get_monteclora_loss() == 0.0
        total.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        totals.append((total, grads))
    near(totals[0][0], totals[1][0])
    all_near(totals[0][1], totals[1][1])
    plain = trimtab.get_peft_model(build("llama"), trimtab.LoraConfig(target_modules=["q_proj"])).train()
    assert plain._get_kasa_loss() == 0.0
    config = trimtab.LoraConfig(target_modules=["q_proj"], monteclora_config=trimtab.MontecloraConfig())
    model = trimtab.get_peft_model(build("llama"), config).train()
    ids = batch("llama")["input_ids"]
    model(ids)
    assert model._get_monteclora_loss() > 0
    model(ids, labels=ids)
    assert model._get_monteclora_loss() == 0.0
    model.eval()(ids)
    assert model._get_monteclora_loss() == 0.0
