"""The methods that PEFT does not have, against their papers' formulas in plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import gpt2, llama, t5, tokens
from trimtab import BitFitConfig, BottleneckConfig, DyLoraConfig, LoReFTConfig, PeftModel, get_peft_model
from trimtab.errors import RouteError
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.example import Example


def dot(a: list, b: list) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def logits(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return model(x, **kwargs).logits


# ---------------------------------------------------------------------- BitFit
def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    base = Net().double()
    biases = {n: p.detach().clone() for n, p in base.named_parameters() if n.endswith("bias")}
    model = adapted(BitFitConfig(), base)
    trained = {n.split(".")[-3]: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {n.partition(".")[0] for n in biases}
    plain = Net().double()
    for name, b in biases.items():
        layer = name.partition(".")[0]
        plain.get_submodule(layer).bias.data = b + trained[layer].detach()
    same(model(image()), plain(image()))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_bitfit_of_a_norm_without_a_bias() -> None:
    with pytest.raises(ValueError, match="a norm that has no bias to train"):
        get_peft_model(llama(), BitFitConfig(target_modules=["norm"]))
    assert len([p for p in get_peft_model(gpt2(), BitFitConfig()).parameters() if p.requires_grad]) == 13


# ---------------------------------------------------------------------- bottleneck adapters
@pytest.mark.parametrize("parallel", [False, True])
def test_bottleneck(parallel: bool) -> None:
    config = BottleneckConfig(target_modules=["linear"], r=3, scaling=1.5, non_linearity="tanh", parallel=parallel)
    model = adapted(config)
    layer = model.get_base_model().linear
    D, d, U, u = (
        numbers(getattr(getattr(layer, f"bottleneck_{n}")["default"], p)) for n in "DU" for p in ("weight", "bias")
    )
    x = torch.randn(4, 12, dtype=torch.float64)
    expected = []
    for row, out in zip(numbers(x), numbers(layer.base_layer(x))):
        z = [math.tanh(dot(w, row if parallel else out) + b) for w, b in zip(D, d)]
        expected.append([y + 1.5 * (dot(w, z) + b) for y, w, b in zip(out, U, u)])
    same(layer(x), expected)
    check_gradients(model, image())


def test_a_parallel_adapter_of_a_whole_block() -> None:
    """He et al. 2022: the feed-forward part's output plus a network of its input, also where rows differ."""
    model = adapted(BottleneckConfig(target_modules=["mlp"], r=3, parallel=True, layers_to_transform=[1]), llama())
    x, base, plain = tokens(vocabulary=64), model.get_base_model(), llama().double()
    block = base.model.layers[1].mlp
    D, U = block.bottleneck_D["default"], block.bottleneck_U["default"]
    own = plain.model.layers[1].mlp.forward
    plain.model.layers[1].mlp.forward = lambda h: own(h) + (torch.relu(h @ D.weight.T + D.bias) @ U.weight.T + U.bias)
    same(logits(model, x), plain(x).logits)
    same(logits(model, x, adapter_names=["default", "__base__"] * 2)[::2], plain(x[::2]).logits)
    same(logits(model, x, adapter_names=["default", "__base__"] * 2)[1::2], llama().double()(x[1::2]).logits)
    assert base.model.layers[1].mlp.down_proj is block.base_layer.down_proj


class Masked(nn.Module):
    """A block that is given a table of all tokens by tokens, as torch's own layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask @ self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    """One of those, with a mask that looks back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Masked()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, torch.ones(x.shape[1], x.shape[1]).tril())


def test_a_table_that_may_be_rows_or_tokens_is_refused() -> None:
    """Each row its own adapter: a mask cut to one line would be spread over all tokens, silently."""
    model = get_peft_model(Blocks(), BottleneckConfig(target_modules=["block"], r=3, init_weights=False))
    model.add_adapter("b", BottleneckConfig(target_modules=["block"], r=3, init_weights=False))
    model.eval()
    names = ["default", "b", "__base__"]
    with pytest.raises(RouteError, match=r"given mask of shape \[3, 3\] for 3 rows of 3 tokens"):
        model(torch.randn(3, 3, 6), adapter_names=names)
    x = torch.randn(3, 4, 6)
    found = model(x, adapter_names=names)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        same(found[row], model(x)[row], 1e-6)
    same(found[2], Blocks()(x)[2], 1e-6)


@pytest.mark.parametrize("length", [3, 5])
def test_rows_that_differ_at_blocks_which_hand_on_what_all_rows_share(length: int) -> None:
    """T5's first block makes the bias of positions that the others take, one for all rows without padding."""
    config = BottleneckConfig(target_modules=r".*\.block\.\d", r=3, init_weights=False)
    model = get_peft_model(t5(), config)
    model.add_adapter("b", config)
    model.eval()
    x = tokens(3, length, vocabulary=20)
    given = {"decoder_input_ids": x, "use_cache": False}
    found = logits(model, x, adapter_names=["default", "b", "b"], **given)
    for row, name in enumerate(["default", "b", "b"]):
        model.set_adapter(name)
        same(found[row], logits(model, x, **given)[row], 1e-5)


def test_defaults_are_houlsbys() -> None:
    model = get_peft_model(llama(), BottleneckConfig(r=2))
    assert {n.rsplit(".", 1)[-1] for n in model.base_model.targeted_module_names} == {"o_proj", "down_proj"}
    same(logits(model, tokens(vocabulary=64)), llama()(tokens(vocabulary=64)).logits)


# ---------------------------------------------------------------------- LoReFT
def edited(model: PeftModel, at: int, places: list[list[int]], x: Tensor) -> Tensor:
    """The logits of a plain Llama, one layer of which has its output edited at these tokens of each row."""
    block = model.get_base_model().model.layers[at]
    R, W, b = block.methods["default"][0].R(), block.loreft_W["default"].weight, block.loreft_W["default"].bias
    R, W, b = numbers(R), numbers(W), numbers(b)
    plain = llama().double()

    def edit(module: Any, args: Any, h: Tensor) -> Tensor:
        h = h.clone()
        for row, chosen in enumerate(places):
            for t in chosen:
                old = numbers(h[row, t])
                gap = [dot(w, old) + c - dot(r, old) for w, c, r in zip(W, b, R)]
                h[row, t] += torch.tensor(
                    [sum(r[i] * g for r, g in zip(R, gap)) for i in range(len(old))], dtype=h.dtype
                )
        return h

    plain.model.layers[at].register_forward_hook(edit)
    return plain(x).logits


def test_loreft_edits_the_first_and_last_tokens_that_are_no_padding() -> None:
    model = adapted(LoReFTConfig(r=2, positions="f1+l2", target_modules=r".*layers\.1"), llama())
    (method,) = model.get_base_model().model.layers[1].methods["default"]
    same(method.R() @ method.R().mT, torch.eye(2, dtype=torch.float64))
    x = tokens(vocabulary=64)
    same(logits(model, x), edited(model, 1, [[0, 3, 4]] * 4, x))
    mask = torch.ones_like(x)
    mask[1, :2] = 0  # padding on the left
    mask[2, 4:] = 0  # and on the right
    places, rows = [[0, 3, 4], [2, 3, 4], [0, 2, 3]], [0, 1, 2]
    block = model.get_base_model().model.layers[1]
    seen: list[Tensor] = []
    block.base_layer.register_forward_hook(lambda m, a, y: seen.append(y))
    block.register_forward_hook(lambda m, a, y: seen.append(y))
    model(x, attention_mask=mask)
    changed = (seen[1] - seen[0]).abs().amax(-1) > 1e-9
    for row in rows:
        assert changed[row].nonzero().flatten().tolist() == places[row]
    labels = x.clone()
    labels[:, :3] = -100  # the prompt: three tokens
    seen.clear()
    model(x, attention_mask=torch.ones_like(x), labels=labels)
    changed = (seen[1] - seen[0]).abs().amax(-1) > 1e-9
    assert all(row.nonzero().flatten().tolist() == [0, 1, 2] for row in changed)
    seen.clear()  # a loop that spares the head the prompt gives the labels of the last positions only
    model(x, labels=labels[:, 2:], logits_to_keep=torch.arange(2, 5))
    changed = (seen[1] - seen[0]).abs().amax(-1) > 1e-9
    assert all(row.nonzero().flatten().tolist() == [0, 1, 2] for row in changed)


def test_loreft_scores_held_out_rows_as_it_generates_from_their_prompts() -> None:
    """The loss of an answer is that of the tokens it would generate: the answer itself is not edited."""
    model = adapted(LoReFTConfig(r=2, positions="f1+l1", target_modules=r".*layers\.\d"), llama(), amount=2.0)
    prompt, answer = [5, 9, 3], [7, 2]
    expected, ids = 0.0, torch.tensor([prompt])
    cache = None
    for i, token in enumerate(answer):
        out = model(ids, attention_mask=torch.ones(1, 3 + i), past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, torch.tensor([[token]])
        expected -= float(out.logits[0, -1].log_softmax(-1)[token]) / len(answer)
    row = Example(prompt + answer, [-100] * 3 + answer, 3)
    assert evaluate_loss(model, [row]).loss == pytest.approx(expected, abs=1e-6)


def test_loreft_generates_from_an_edited_prompt(tmp_path: Path) -> None:
    model = adapted(LoReFTConfig(r=2, positions="f1+l1", target_modules=r".*layers\.\d"), llama(), amount=2.0)
    x = tokens(vocabulary=64)
    plain = llama().double()
    for at in (0, 1):
        (method,) = model.get_base_model().model.layers[at].methods["default"]

        def edit(module: Any, args: Any, h: Tensor, method: Any = method) -> Tensor:
            h = h.clone()
            for t in [0, 4] if h.shape[1] == 5 else []:
                R = method.R()
                h[:, t] += (h[:, t] @ (method.loreft_W - R).T + method.loreft_W_bias) @ R
            return h

        plain.model.layers[at].register_forward_hook(edit)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(x)}
    for beams in (1, 2):
        assert torch.equal(model.generate(x, num_beams=beams, **options), plain.generate(x, num_beams=beams, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_loreft_starts_as_the_model_and_trains() -> None:
    model = get_peft_model(llama(), LoReFTConfig(r=2)).double()
    x = tokens(vocabulary=64)
    same(logits(model, x), llama().double()(x).logits, 1e-6)
    model(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    check = adapted(LoReFTConfig(r=2, positions="all", target_modules=["linear"]))
    check_gradients(check, image())
    with pytest.raises(ValueError, match="`positions` should be"):
        LoReFTConfig(positions="x3")


# ---------------------------------------------------------------------- DyLoRA
def test_dylora_at_every_rank() -> None:
    for rank in (1, 2, 3):
        model = adapted(DyLoraConfig(target_modules=["linear"], r=3, rank=rank, lora_alpha=5))
        layer = model.get_base_model().linear
        A, B = (numbers(getattr(layer, n)["default"].weight) for n in ("lora_A", "lora_B"))
        W = numbers(layer.base_layer.weight)
        for i, row in enumerate(W):
            for j in range(len(row)):
                row[j] += 5 / rank * sum(B[i][k] * A[k][j] for k in range(rank))
        same(merged(model, "linear"), W)
        merging_changes_nothing(model, image())


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_draws_one_rank_a_forward(frozen: bool) -> None:
    config = DyLoraConfig(target_modules=["q_proj", "v_proj"], r=4, min_rank=2, frozen=frozen)
    model, ranks = adapted(config, llama()).train(), []
    for _ in range(40):
        model.zero_grad()
        logits(model, tokens(vocabulary=64)).sum().backward()
        found = {n: p.grad.abs().amax(1) > 0 for n, p in model.named_parameters() if "lora_A" in n}
        drawn = {tuple(rows.nonzero().flatten().tolist()) for rows in found.values()}
        assert len(drawn) == 1
        ranks.append(drawn.pop())
    assert set(ranks) == ({(1,), (2,), (3,)} if frozen else {(0, 1), (0, 1, 2), (0, 1, 2, 3)})


def test_dylora_refuses_ranks_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"`rank` should be from 1 to r \(4\), not 5"):
        DyLoraConfig(r=4, rank=5)
