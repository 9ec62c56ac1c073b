"""LLaMA-Adapter in plain loops; where it stands, and beside other adapters."""

from __future__ import annotations

import copy
from math import cos, exp, sin, sqrt

import pytest
import torch

from tests.methods.nets import adapted, numbers, same
from tests.models import gpt2, llama, snapshot, tokens
from trimtab import AdaptionPromptConfig, LoraConfig, PeftModel, get_peft_model
from trimtab.errors import ReadOnlyWeight


def config(**fields):
    return AdaptionPromptConfig(task_type="CAUSAL_LM", **{"adapter_len": 3, "adapter_layers": 1, **fields})


def times(M, x):
    return [sum(a * b for a, b in zip(row, x)) for row in M]


def seen(model, layer):
    """The inputs and outputs of the attention `layer`, and what it gives without its prompt."""
    module, kept = model.get_base_model().get_submodule(layer), {}
    base, hook = module.base_layer, lambda name: lambda m, a, k, out: kept.update({name: (a, k, out[0])})
    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in (("whole", module), ("base", base))]
    model(tokens(vocabulary=64)[:2, :4])
    for handle in handles:
        handle.remove()
    (args, kwargs, y), (_, _, without) = kept["whole"], kept["base"]
    return kwargs.get("hidden_states", args[0] if args else None), y, without, base


def attended(q, K, V, size):
    """Heads of one query over the prompt; two heads of queries share one of keys where there are fewer."""
    heads, out = len(q) // size, []
    for h in range(heads):
        kv = h // (heads * size // len(K[0]))
        part = lambda row, at=kv: row[at * size : (at + 1) * size]
        scores = [sum(a * b for a, b in zip(q[h * size : (h + 1) * size], part(k))) / sqrt(size) for k in K]
        top = sum(exp(s) for s in scores)
        out += [sum(exp(s) / top * part(v)[i] for s, v in zip(scores, V)) for i in range(size)]
    return out


def test_formula_in_a_llama() -> None:
    model = adapted(config(), llama())
    name = "model.layers.1.self_attn"
    x, y, without, attention = seen(model, name)
    module, size = model.get_base_model().get_submodule(name), attention.head_dim
    P, g = numbers(module.adaption_prompt["default"])[0], float(module.adaption_gate["default"])
    Q, K, V, O = (numbers(getattr(attention, f"{n}_proj").weight) for n in "qkvo")
    K, V = [times(K, p) for p in P], [times(V, p) for p in P]
    for row in range(2):
        for t in range(4):
            q = times(Q, numbers(x[row, t]))
            for h in range(0, len(q), size):  # rotary positions
                for i in range(size // 2):
                    angle = t / 10000 ** (2 * i / size)
                    a, b = q[h + i], q[h + i + size // 2]
                    q[h + i], q[h + i + size // 2] = a * cos(angle) - b * sin(angle), b * cos(angle) + a * sin(angle)
            add = times(O, [g * v for v in attended(q, K, V, size)])
            same(y[row, t], [w + a for w, a in zip(numbers(without[row, t]), add)], 1e-6)  # angles are fp32 there


def test_formula_in_a_gpt2() -> None:
    model = adapted(config(), gpt2())
    x, y, without, attention = seen(model, "transformer.h.1.attn")
    module = model.get_base_model().get_submodule("transformer.h.1.attn")
    P, g = numbers(module.adaption_prompt["default"])[0], float(module.adaption_gate["default"])
    W, b, d = numbers(attention.c_attn.weight.T), numbers(attention.c_attn.bias), 16
    project = lambda v: [a + c for a, c in zip(times(W, v), b)]
    K, V = [project(p)[d : 2 * d] for p in P], [project(p)[2 * d :] for p in P]
    for row, t in ((0, 0), (1, 3)):
        add = attended(project(numbers(x[row, t]))[:d], K, V, attention.head_dim)
        same(y[row, t], [w + g * a for w, a in zip(numbers(without[row, t]), add)], 1e-6)


def test_identity_gradients_and_the_way_back() -> None:
    base, x = llama(), tokens(vocabulary=64)
    want, before = base(x).logits, snapshot(base)
    model = get_peft_model(base, config(adapter_layers=2))
    assert torch.equal(model(x).logits, want)
    assert [n.split(".")[4] for n, p in model.named_parameters() if "adaption" in n] == ["0", "0", "1", "1"]
    model(x).logits.sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad is not None for p in trained)
    back = model.unload()
    assert {n: id(m) for n, m in back.named_modules()} == before["modules"]
    assert torch.equal(back(x).logits, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    grads, x = [], tokens(vocabulary=64)
    for checkpointing in (False, True):
        model = adapted(config(adapter_layers=2), llama()).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        model(x, labels=x).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        same(a, b)


def test_beside_another_and_a_lora_inside(tmp_path) -> None:
    model, x = adapted(config(), llama()), tokens(vocabulary=64)
    alone = model(x).logits
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    same(model(x).logits, alone)
    model.set_adapter(["default", "lora"])
    both = model.eval()(x).logits
    assert (both - alone).abs().max() > 1e-3
    same(copy.deepcopy(model)(x).logits, both)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    same(loaded(x).logits, alone)
    loaded.load_adapter(tmp_path / "lora", "lora")
    loaded.set_adapter(["default", "lora"])
    same(loaded.eval()(x).logits, both)
    with model.disable_adapter():
        same(model(x).logits, llama().double()(x).logits)


def test_generation_reads_on() -> None:
    model, x = adapted(config(adapter_layers=2), llama()), tokens(vocabulary=64)
    ask = {"input_ids": x, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        a, b = (model.generate(**ask, num_beams=beams, use_cache=cache) for cache in (True, False))
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_mixed_batch_is_its_rows_alone() -> None:
    model, x = adapted(config(), llama()), tokens(2, 5, 64)
    alone = model(x).logits
    mixed = model(x, adapter_names=["default", "__base__"], use_cache=False).logits
    same(mixed[:1], alone[:1])
    with model.disable_adapter():
        same(mixed[1:], model(x).logits[1:])


def test_errors() -> None:
    for fields, words in (
        ({"adapter_layers": 9}, "more adapter layers '9' than the model has '2'"),
        ({"adapter_len": None}, "adapter_len"),
        ({"adapter_layers": 0}, "adapter_layers"),
        ({"target_modules": "mlp"}, "no attention"),
    ):
        with pytest.raises(ValueError, match=words):
            get_peft_model(llama(), config(**fields))
    model = adapted(config(), llama())
    with pytest.raises(ReadOnlyWeight, match="no single weight"):
        model.merge_adapter()
