"""P-tuning's encoders in plain loops."""

from __future__ import annotations

import warnings
from math import exp, tanh

import pytest
import torch
from safetensors.torch import load_file

from tests.methods.nets import numbers, same
from tests.models import llama
from trimtab import PromptEncoderConfig, get_peft_model


def model(**fields):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4, **fields)
    return get_peft_model(llama().double(), config).double().eval()


def affine(W, b, x):
    return [sum(w * v for w, v in zip(row, x)) + shift for row, shift in zip(W, b)]


def mlp(layers, x):
    for i, layer in enumerate(layers):
        x = affine(numbers(layer.weight), numbers(layer.bias), x)
        x = x if i == len(layers) - 1 else [max(v, 0.0) for v in x]
    return x


def lstm(net, suffix, xs):
    """One direction of one layer: gates in the order input, forget, cell, output."""
    W, U, b, c_ = (numbers(getattr(net, f"{n}_{suffix}")) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    size, out = len(U[0]), []
    h, c = [0.0] * size, [0.0] * size
    for x in xs:
        g = [u + v for u, v in zip(affine(W, b, x), affine(U, c_, h))]
        i, f, o = ([1 / (1 + exp(-v)) for v in g[k * size : (k + 1) * size]] for k in (0, 1, 3))
        c = [f[k] * c[k] + i[k] * tanh(g[2 * size + k]) for k in range(size)]
        h = [o[k] * tanh(c[k]) for k in range(size)]
        out.append(h)
    return out


def test_mlp() -> None:
    adapted = model()
    own = adapted.prompt_encoder["default"]
    layers = [own.mlp_head[i] for i in (0, 2, 4)]
    same(adapted.get_prompt(1)[0], [mlp(layers, x) for x in numbers(own.embedding.weight)])


def test_lstm() -> None:
    adapted = model(encoder_reparameterization_type="LSTM")
    own = adapted.prompt_encoder["default"]
    xs = numbers(own.embedding.weight)
    for layer in range(2):
        ahead, back = lstm(own.lstm_head, f"l{layer}", xs), lstm(own.lstm_head, f"l{layer}_reverse", xs[::-1])[::-1]
        xs = [a + b for a, b in zip(ahead, back)]
    same(adapted.get_prompt(1)[0], [mlp([own.mlp_head[0], own.mlp_head[2]], x) for x in xs])


def test_the_prompt_that_is_saved_in_training_has_no_dropout(tmp_path) -> None:
    adapted = model(encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    wanted = adapted.get_prompt(1)[0].detach()
    before = torch.get_rng_state()
    adapted.train().save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], wanted)
    assert adapted.prompt_encoder["default"].lstm_head.training


def test_layers_of_the_lstm_are_no_layers_of_the_mlp() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers"):
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_num_layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptEncoderConfig(num_virtual_tokens=3, encoder_num_layers=3, encoder_reparameterization_type="LSTM")
