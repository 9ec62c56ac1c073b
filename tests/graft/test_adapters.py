"""Several adapters on one model: which acts, which trains, what stays in the module tree, and generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.contract.cases import move, tensors
from tests.models import assert_untouched, classifier, gpt2, llama, logits, snapshot, tokens, toy
from trimtab import HRAConfig, LoraConfig, get_layer_status, get_model_status, get_peft_model
from trimtab.errors import ConfigError, PeftWarning
from trimtab.graft.residents import LIMIT

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = tokens()


def several(count: int) -> Any:
    model = get_peft_model(toy(), CONFIG, "a0").eval()
    move(model, "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", CONFIG)
        model.eval()
        move(model, f"a{i}")
    return model


def trained(model: Any) -> set[str]:
    return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}


def test_adding_neither_activates_nor_trains() -> None:
    model = several(1)
    expected = model(IDS)
    model.add_adapter("new", LoraConfig(target_modules=["up"], init_lora_weights=False))
    assert model.active_adapters == ["a0"]
    assert trained(model) == {"a0"}
    assert torch.equal(model(IDS), expected)


def test_active_and_trainable_are_two_things() -> None:
    model = several(3)
    model.set_adapter("a1")
    assert (model.active_adapter, trained(model)) == ("a1", {"a1"})
    model.set_requires_grad("a2")
    assert (model.active_adapters, trained(model)) == (["a1"], {"a1", "a2"})
    model.set_adapter(["a0", "a1"])
    assert (model.active_adapters, trained(model)) == (["a0", "a1"], {"a0", "a1"})
    model.set_adapter("a2", inference_mode=True)
    assert (model.active_adapter, trained(model)) == ("a2", set())


def test_deleting_the_active_one_says_which_follows() -> None:
    model = several(3)
    with pytest.warns(PeftWarning, match="Setting active adapter to a1"):
        model.delete_adapter("a0")
    assert model.active_adapters == ["a1"]
    assert not [n for n in model.state_dict() if ".a0." in n]


@pytest.mark.usefixtures("parked")
def test_the_module_tree_does_not_grow_with_what_is_merely_loaded() -> None:
    few, many = several(LIMIT + 2), several(LIMIT + 12)
    assert len(list(many.modules())) == len(list(few.modules()))
    assert len(list(many.parameters())) == len(list(few.parameters()))
    layer = many.base_model.model.up
    assert len(layer.lora_A) == LIMIT + 12, "but all are found"
    assert layer.lora_A["a1"].weight.shape == (2, 6)
    assert layer.scaling["a5"] == 4.0
    outputs = []
    for name in ("a3", "a15", "a3"):
        many.set_adapter(name)
        outputs.append(many.eval()(IDS))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.usefixtures("parked")
def test_parked_adapters_follow_to_another_number_format() -> None:
    model = several(LIMIT + 6)
    assert any(a.parked for a in model.graft.adapters.values())
    model.double()
    for i in range(LIMIT + 6):
        model.set_adapter(f"a{i}")
        assert model(IDS).dtype == torch.float64
        assert all(t.dtype == torch.float64 for t in tensors(model, f"a{i}").values())


@pytest.mark.usefixtures("parked")
def test_parked_adapters_serve_mixed_batches() -> None:
    model = several(LIMIT + 6)
    parked = [n for n, a in model.graft.adapters.items() if a.parked]
    names = [parked[0], "a0", parked[1], "__base__"]
    mixed = model(IDS, adapter_names=names)
    for i, name in enumerate(names[:3]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[[i]], model.eval()(IDS[[i]]), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("parked")
def test_a_layer_all_of_whose_adapters_are_parked_shows_their_settings() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]), "alone")
    for i in range(LIMIT + 2):
        model.add_adapter(f"a{i}", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter(f"a{i}")
    assert model.graft.adapters["alone"].parked
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert list(layer.lora_dropout) == list(layer.use_dora) == ["alone"]
    assert len(layer.lora_magnitude_vector) == 0
    assert layer.lora_dropout["alone"].p == 0.25


# ---------------------------------------------------------------------- biases and heads
@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_of_the_base_train_and_go_away(kind: str) -> None:
    base = toy()
    expected, before = base(IDS), snapshot(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up", "head"], bias=kind)).train()
    free = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    biased = {n for n, m in toy().named_modules() if getattr(m, "bias", None) is not None}
    assert {n.split(".")[2] for n in free} == (biased if kind == "all" else {"up"})
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).square().sum().backward()
    optimiser.step()
    trained = model.eval()(IDS)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS), expected)
    assert torch.equal(model(IDS), trained)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(model(IDS), trained)
    model.unload()
    assert_untouched(base, before)
    assert torch.equal(base(IDS), expected)


def test_biases_that_are_none_we_know_are_refused() -> None:
    base = toy()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="Requested bias: 'hra'"):
        get_peft_model(base, HRAConfig(r=2, target_modules=["up"], bias="hra"))
    assert_untouched(base, before)


def test_heads_are_trained_whole_and_each_adapter_has_its_own() -> None:
    ids = tokens(3, 5, 64)
    model = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", r=2)).eval()
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=2))
    model.eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["other"].weight.add_(1)
    first = logits(model, ids)
    model.set_adapter("other")
    second = logits(model.eval(), ids)
    assert not torch.equal(first, second)
    mixed = model(ids, adapter_names=["other", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], second[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], first[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[2], logits(classifier(), ids)[2], rtol=1e-5, atol=1e-6)


def test_the_users_config_is_never_changed() -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2)
    wanted = config.copy()
    for _ in range(3):
        get_peft_model(classifier(), config)
    assert config == wanted


# ---------------------------------------------------------------------- tied weights
def test_merging_at_one_of_two_tied_layers_unties_aloud_and_unmerging_ties_again() -> None:
    base = gpt2()
    ids = tokens(2, 5, 64)
    plain = logits(base, ids)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["wte"])).eval()
    move(model, "default")
    expected = logits(model, ids)
    with pytest.warns(PeftWarning, match="share one weight"):
        model.merge_adapter()
    assert base.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert base.config.tie_word_embeddings is True
    model.unload()
    assert base.lm_head.weight is base.transformer.wte.weight
    assert torch.equal(logits(base, ids), plain)


# ---------------------------------------------------------------------- generation
def causal() -> Any:
    model = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, init_lora_weights=False)
    ).eval()
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=96, init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beams", "returns"]
)
def test_mixed_generation_equals_each_alone(more: dict[str, int]) -> None:
    model, ids = causal(), tokens(3, 4, 60)
    fixed = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, **more}
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **fixed)
    assert torch.equal(mixed, model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, **fixed))
    count = more.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        if name == "__base__":
            alone = llama().generate(ids[[i]], attention_mask=torch.ones(1, 4, dtype=torch.long), **fixed)
        else:
            model.set_adapter(name)
            alone = model.eval().generate(ids[[i]], attention_mask=torch.ones(1, 4, dtype=torch.long), **fixed)
        assert torch.equal(mixed[i * count : (i + 1) * count], alone), name


# ---------------------------------------------------------------------- status
def test_status() -> None:
    model = several(2)
    rows = get_layer_status(model)
    assert [r.name for r in rows] == ["model.up", "model.head"]
    assert rows[0].available_adapters == ["a0", "a1"]
    assert rows[0].requires_grad == {"a0": True, "a1": False}
    status = get_model_status(model)
    assert (status.active_adapters, status.merged_adapters, status.enabled) == (["a0"], [], True)
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.base_model.model.up.set_adapter("a1")
    assert get_model_status(model).active_adapters == "irregular"
    model.merge_adapter(["a0"])
    assert get_model_status(model).merged_adapters == ["a0"]
    with pytest.raises((TypeError, ValueError), match="No adapter"):
        get_layer_status(toy())


def test_layers_can_be_scaled_and_switched_by_themselves() -> None:
    model = several(2)
    layer, plain = model.base_model.model.up, model(IDS)
    layer.set_scale("a0", 2)
    assert layer.scaling["a0"] == 8.0
    assert not torch.equal(model(IDS), plain)
    layer.unscale_layer()
    assert torch.equal(model(IDS), plain)
    layer.enable_adapters(False)
    switched = model(IDS)
    assert not torch.equal(switched, plain)
    model.set_adapter("a0")
    assert torch.equal(model.eval()(IDS), plain)


@pytest.mark.usefixtures("parked")
def test_adapters_that_optimisers_hold_learn_on_however_many_there_are() -> None:
    """Beyond the few last used they leave the module tree; their parameters come back as the same objects."""
    names, ids = [f"task{i}" for i in range(12)], tokens()

    def build() -> Any:
        model = get_peft_model(toy(torch.float64), LoraConfig(r=2, target_modules=["up", "head"]), names[0])
        for i, name in enumerate(names):
            torch.manual_seed(i)
            if i:
                model.add_adapter(name, LoraConfig(r=2, target_modules=["up", "head"]))
        return model

    def own(model: Any, name: str) -> list[Any]:
        model.set_adapter(name)
        return [p for p in model.parameters() if p.requires_grad]

    def step(model: Any, name: str, optimizer: Any) -> None:
        model.set_adapter(name)
        model(ids).square().mean().backward()
        if name == names[3]:
            model.set_adapter(names[0])  # it may be switched before the step, too
        optimizer.step()
        optimizer.zero_grad()

    model = build()
    optimizers = {name: torch.optim.Adam(own(model, name), lr=1e-2) for name in names}
    for _ in range(3):
        for name in names:
            step(model, name, optimizers[name])
    for name in names:
        single = build()
        optimizer = torch.optim.Adam(own(single, name), lr=1e-2)
        for _ in range(3):
            step(single, name, optimizer)
        for ours, theirs in zip(own(model, name), own(single, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    twin = copy.deepcopy(model)  # of which no optimiser holds anything
    for name in names:
        for ours, theirs in zip(own(twin, name), own(model, name), strict=True):
            assert ours is not theirs
            assert torch.equal(ours, theirs)
