"""LoRA's variants against their papers' formulas in plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.formulas import add, lora, product, transposed
from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import assert_untouched, llama, snapshot, tokens
from trimtab import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    create_arrow_model,
    get_peft_model,
)
from trimtab.errors import ConfigError, PeftWarning
from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods.alora import invoked

R, ALPHA = 4, 6


def variant(**fields: Any) -> LoraConfig:
    return LoraConfig(target_modules=["linear"], r=R, lora_alpha=ALPHA, **fields)


def factors(model: PeftModel) -> tuple[Any, Any, Any]:
    layer = model.get_base_model().linear
    weight = layer.base_layer.weight
    return numbers(weight), numbers(layer.lora_A["default"].weight), numbers(layer.lora_B["default"].weight)


def test_kasa() -> None:
    original = adapted(LoraConfig(target_modules=["linear"])).get_base_model().linear.base_layer.weight.detach()
    model = adapted(variant(kasa_config=KasaConfig(beta=0.1, gamma=0.2)))
    W, A, B = factors(model)
    d = numbers(model.get_base_model().linear.lora_diag["default"])
    scaled = [[b * x for b, x in zip(row, d, strict=True)] for row in B]
    same(merged(model, "linear"), lora(W, A, scaled, R, ALPHA))
    S, kept = torch.linalg.svdvals(original), torch.linalg.svdvals(torch.tensor(W, dtype=torch.float64))
    same(kept[: len(S) - R], S[: len(S) - R], 1e-9)
    assert float(kept[len(S) - R :].max()) < 1e-9
    skew = 0.0
    for M in (product(transposed(B), B), product(A, transposed(A))):
        skew += sum((v - (i == j)) ** 2 for i, row in enumerate(M) for j, v in enumerate(row)) ** 0.5
    same(model.base_model.penalties()["default"], 0.1 * sum(v * v for v in d) + 0.2 * skew)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("which", ["a", "b"])
def test_bdlora(which: str) -> None:
    blocks, fields = (
        (2, {"target_modules_bd_a": ["linear"]}) if which == "a" else (1, {"target_modules_bd_b": ["linear"]})
    )
    model = adapted(variant(use_bdlora=BdLoraConfig(nblocks=blocks, **fields)))
    W, A, B = factors(model)
    if which == "a":  # the first half of the rows sees the first half of the features
        half = R // 2
        A = [[0.0] * (6 * (i // half)) + row + [0.0] * (6 * (1 - i // half)) for i, row in enumerate(A)]
    same(merged(model, "linear"), lora(W, A, B, R, ALPHA))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_mica_trains_a_alone_along_the_least_of_w() -> None:
    model = adapted(variant(init_lora_weights="mica"))
    W, A, B = factors(model)
    U = torch.linalg.svd(torch.tensor(W, dtype=torch.float64)).U
    same(torch.tensor(B, dtype=torch.float64), U[:, 1:5], 1e-6)
    same(merged(model, "linear"), add(W, product(B, A), ALPHA / R))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [".lora_A." in n for n in trained] == [True]
    check_gradients(model, image())


def test_mica_takes_no_more_columns_than_there_are() -> None:
    said = r"MiCA requires `r` <= min\(in_features, out_features\) but got r=6 .* \(max usable r is 5\).* 'linear'"
    with pytest.raises(ValueError, match=said):
        adapted(LoraConfig(target_modules=["linear"], r=6, init_lora_weights="mica"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [([1, 7, 8, 2], 3), ([7, 8, 7, 8], 2), ([8, 7, 1, 2], 0), ([7, 7, 7, 8], 2), ([7, 8, 7, 7], 4)],
)
def test_the_last_invocation_counts(row: list[int], expected: int) -> None:
    assert invoked(torch.tensor([row, row]), torch.tensor([7, 8])).tolist() == [expected] * 2
    assert invoked(torch.tensor([row]), torch.tensor([7] * 9)).tolist() == [0]


def test_alora_leaves_the_base_as_it_is_before_the_invocation() -> None:
    x = tokens(vocabulary=64)
    x[:2, 2], x[2:, 2] = 7, 9
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=R, alora_invocation_tokens=[7])
    model, base = adapted(config, llama()), llama().double()
    plain = adapted(LoraConfig(target_modules=["q_proj", "v_proj"], r=R), llama())
    plain.load_state_dict(model.state_dict())
    out, expected = model(x).logits, base(x).logits
    same(out[:, :2], expected[:, :2])
    same(out[2:], expected[2:])
    assert float((out[:2, 2:] - expected[:2, 2:]).detach().abs().min(-1).values.max()) > 1e-6
    mixed = model(x, adapter_names=["default", "__base__"] * 2).logits
    same(mixed[::2], out[::2])
    same(mixed[1::2], expected[1::2])
    whole = x.clone()
    whole[:, 0] = 7
    whole[:, 2] = 5
    same(model(whole).logits, plain(whole).logits)
    with pytest.raises(ValueError, match="`input_ids` is needed"):
        model(inputs_embeds=base.get_input_embeddings()(x))
    with pytest.raises(ValueError, match="does not go with init_lora_weights='pissa'"):
        get_peft_model(llama(), LoraConfig(alora_invocation_tokens=[7], init_lora_weights="pissa"))


def test_a_hook_may_say_where_alora_acts() -> None:
    """PEFT's example of multi-token prediction hooks the layers of a model that is called without its wrapper."""
    x = tokens(vocabulary=64)
    x[:2, 2], x[2:, 2] = 7, 9
    model = adapted(LoraConfig(target_modules=["q_proj", "v_proj"], r=R, alora_invocation_tokens=[7]), llama())
    expected, base = model(x).logits, model.base_model.model
    offsets = [x.shape[1] - 2] * 2 + [None] * (len(x) - 2)
    for layer in [m for m in base.modules() if isinstance(m, AdaptedLayer)]:
        layer.register_forward_pre_hook(lambda m, args, kw: kw.update(alora_offsets=offsets), with_kwargs=True)
    same(base(x).logits, expected)
    offsets[:] = [None] * len(x)
    with model.disable_adapter():
        plain = base(x).logits
    same(base(x).logits, plain)


def test_tied_layers_share_one_pair() -> None:
    x, base = tokens(vocabulary=64), llama(tie_word_embeddings=True).double()
    for target in ("embed_tokens", "lm_head"):
        config = LoraConfig(target_modules=[target], r=R, lora_alpha=ALPHA, ensure_weight_tying=True)
        model = adapted(config, llama(tie_word_embeddings=True))
        assert sum(p.requires_grad for p in model.parameters()) == 2
        changed = llama(tie_word_embeddings=True).double()
        embed = model.get_base_model().model.embed_tokens
        A, B = [p for _, p in model.named_parameters() if p.requires_grad]
        s = ALPHA / R
        dW = s * (B @ A).T if target == "embed_tokens" else s * (B @ A)
        with torch.no_grad():
            changed.model.embed_tokens.weight.add_(dW)
        same(model(x).logits, changed(x).logits)
        mixed = model(x, adapter_names=["default", "__base__"] * 2).logits
        same(mixed[::2], changed(x).logits[::2])
        same(mixed[1::2], base(x).logits[1::2])
        model.merge_adapter()
        same(model(x).logits, changed(x).logits)
        head = model.get_base_model().lm_head
        assert embed.base_layer.weight is getattr(head, "base_layer", head).weight
        model.unmerge_adapter()
        whole = model.merge_and_unload()
        same(whole(x).logits, changed(x).logits)
        assert whole.lm_head.weight is whole.model.embed_tokens.weight
    with pytest.raises(ValueError, match="does not go with init_lora_weights='pissa'"):
        get_peft_model(llama(), LoraConfig(ensure_weight_tying=True, init_lora_weights="pissa"))


def test_velora_trains_a_on_what_is_left_of_its_input() -> None:
    n, c, x = 5, 1.5, torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    model = adapted(variant(velora_config=VeloraConfig(num_groups=n, scale=c)))
    layer = model.get_base_model().linear
    W, A, B = factors(model)
    same(merged(model, "linear"), lora(W, A, B, R, ALPHA))
    merging_changes_nothing(model, image())
    check_gradients(model, image())  # in evaluation they are exact
    model.zero_grad()
    model.train()
    groups = [[[*row, 0.0, 0.0, 0.0][3 * g : 3 * g + 3] for g in range(n)] for row in numbers(x)]
    mean = [sum(group[i] for row in groups for group in row) for i in range(3)]
    v = [m / sum(k * k for k in mean) ** 0.5 for m in mean]
    rebuilt = [[c * sum(a * b for a, b in zip(z, v, strict=True)) * k for z in row for k in v][:12] for row in groups]
    held: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        layer(x.detach()).sum().backward()
    assert x.shape not in held
    dh = [[ALPHA / R * sum(column) for column in transposed(B)]] * 7
    same(layer.lora_A["default"].weight.grad, product(transposed(dh), rebuilt))
    same(layer.lora_velora_embed["default"], v)
    layer(x).sum().backward()
    same(x.grad, product([[1.0] * 5] * 7, lora(W, A, B, R, ALPHA)))
    with pytest.raises(ValueError, match="`num_groups` should be positive"):
        VeloraConfig(num_groups=0)


def test_monteclora_draws_a_in_training_alone() -> None:
    prior, weight, x = 0.4, 3.0, image()
    config = MontecloraConfig(num_samples=2, sample_scaler=0.5, dirichlet_prior=prior, kl_loss_weight=weight)
    model = adapted(variant(monteclora_config=config))
    W, A, B = factors(model)
    same(merged(model, "linear"), lora(W, A, B, R, ALPHA))
    merging_changes_nothing(model, x)
    layer = model.get_base_model().linear
    sampler = layer.lora_monteclora_sampler["default"]
    torch.manual_seed(3)
    model.train()
    y, z = model(x), model(x)
    assert float((y - z).detach().abs().max()) > 1e-3
    same(model.base_model.penalties()["default"], model.base_model.penalties()["default"])
    r, v = R, [math.exp(2 * s) for s in numbers(sampler.std_prior)]
    g = [row[i] for i, row in enumerate(numbers(sampler.gaussian_var_prior))]
    a = [math.exp(p) for p in numbers(sampler.expert_weights_prior)]
    wishart = 0.5 * r * sum(t - math.log(t) - 1 for t in v)
    normal = 0.5 * 2 * sum(t - math.log(t) - 1 for t in g)
    digamma = [float(torch.digamma(torch.tensor(t, dtype=torch.float64))) for t in (*a, sum(a))]
    weights = math.lgamma(sum(a)) - math.lgamma(2 * prior) + sum(math.lgamma(prior) - math.lgamma(t) for t in a)
    weights += sum((t - prior) * (d - digamma[-1]) for t, d in zip(a, digamma[:2], strict=True))
    same(model.base_model.penalties()["default"], weight * (weights + wishart + normal), 1e-9)
    assert abs(sum(numbers(sampler.expert_weights)) - 1) < 1e-12
    losses = []
    for step in (0.0, 1e-6, -1e-6):  # the gradient of one draw
        torch.manual_seed(7)
        with torch.no_grad():
            sampler.std_prior[0] += step
        losses.append(model(x).square().sum() + model.base_model.penalties()["default"])
        with torch.no_grad():
            sampler.std_prior[0] -= step
    losses[0].backward()
    assert sampler.expert_weights_prior.grad.abs().min() > 0
    assert abs(float((losses[1] - losses[2]).detach()) / 2e-6 - float(sampler.std_prior.grad[0])) < 1e-4
    with pytest.raises(ValueError, match="`num_samples` should be positive"):
        MontecloraConfig(num_samples=0)


def test_monteclora_draws_from_the_distributions_that_it_says() -> None:
    draws, n, c = 400, 3, 0.5
    model = adapted(variant(monteclora_config=MontecloraConfig(num_samples=n, sample_scaler=c)))
    layer = model.get_base_model().linear.train()
    sampler, x = layer.lora_monteclora_sampler["default"], torch.eye(12, dtype=torch.float64)
    sigma, p = numbers(sampler.std_prior), numbers(sampler.expert_weights_prior)
    torch.nn.init.zeros_(layer.lora_A["default"].weight)
    torch.nn.init.eye_(layer.lora_B["default"].weight)
    sums, squares, ratios = [0.0] * R, [], []
    torch.manual_seed(5)
    with torch.no_grad():
        for _ in range(draws):
            Z = (layer(x) - layer.base_layer(x))[:, :R] / (ALPHA / R * c)  # (in, r)
            g, w = numbers(sampler.gaussian_var_prior), numbers(sampler.expert_weights)
            assert all(g[i][j] == 0 for i in range(R) for j in range(R) if i != j)
            sums = [total + g[i][i] for i, total in enumerate(sums)]
            ratios.append(math.log(w[0] / w[1]))
            of_mixture = sum(v * v for v in w)
            squares += [float(Z[j, i]) ** 2 / (g[i][i] * of_mixture) for i in range(R) for j in range(12)]
    for i, total in enumerate(sums):  # a Wishart matrix's diagonal: r times the scale matrix's
        assert abs(total / draws / (R * math.exp(2 * sigma[i])) - 1) < 0.15
    assert abs(sum(squares) / len(squares) - 1) < 0.05
    inverse = [math.exp(-v) for v in p]  # Laplace's approximation of a Dirichlet distribution, of concentrations exp p
    variance = sum(inverse[k] * (1 - 2 / n) + sum(inverse) / n**2 for k in (0, 1))
    mean = sum(ratios) / draws
    assert abs(mean - (p[0] - p[1])) < 4 * (variance / draws) ** 0.5
    assert abs(sum((v - mean) ** 2 for v in ratios) / draws / variance - 1) < 0.25


class Packed(torch.nn.Module):
    """A linear layer as GPTQ's library keeps it: whole numbers, and the group of each feature."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", (weight * 50).round().to(torch.int8))
        self.register_buffer("g_idx", torch.arange(self.in_features) // 3)
        self.register_buffer("scales", torch.tensor(0.02))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scales).T


def test_qalora_sums_the_input_of_gptq_layers(tmp_path: Path) -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"linear": Packed(torch.randn(5, 12))})

    config = variant(use_qalora=True, qalora_group_size=3)
    model = get_peft_model(net(), config).eval()
    layer = model.get_base_model()["linear"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.shape, B.shape) == ((R, 4), (5, R))
    torch.nn.init.normal_(B)
    x = torch.randn(2, 7, 12, dtype=A.dtype)
    sums = [[sum(row[3 * g : 3 * g + 3]) for g in range(4)] for row in numbers(x.flatten(0, 1))]
    update = product(product(sums, transposed(numbers(A))), transposed(numbers(B)))
    same(layer(x).flatten(0, 1), add(numbers(layer.base_layer(x).flatten(0, 1)), update, ALPHA / R), 1e-5)
    same(
        layer.get_delta_weight("default") @ x.flatten(0, 1).T,
        transposed([[ALPHA / R * v for v in u] for u in update]),
        1e-5,
    )
    layer(x).sum().backward()
    assert A.grad.shape == A.shape
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(read.get_base_model()["linear"](x), layer(x))
    with pytest.raises(ValueError, match="12 features should be divisible by `qalora_group_size` 5"):
        get_peft_model(net(), variant(use_qalora=True, qalora_group_size=5))


def test_qalora_speaks_up_where_it_is_plain_lora() -> None:
    with pytest.warns(PeftWarning, match="none of the adapted layers is one"):
        model = adapted(variant(use_qalora=True))
    W, A, B = factors(model)
    same(merged(model, "linear"), lora(W, A, B, R, ALPHA))


def test_layers_that_are_repeated(tmp_path: Path) -> None:
    x = tokens(vocabulary=64)
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 1)], init_lora_weights=False)
    base, before = llama(tie_word_embeddings=True), snapshot(llama(tie_word_embeddings=True))["bits"]
    whole = snapshot(base)
    with pytest.raises(ConfigError, match=r"\[\(1, 3\)\] are no ranges"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1), (1, 3)]))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, LoraConfig(target_modules=["nowhere"], layer_replication=[(0, 2), (0, 1)]))
    assert base.config.num_hidden_layers == 2
    model = get_peft_model(base, config).eval()
    layers = base.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2] == list(range(base.config.num_hidden_layers))
    assert layers[2].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    adapters = {layer.self_attn.q_proj.lora_A["default"].weight.data_ptr() for layer in layers}
    assert len(adapters) == 3
    expected = model(x).logits
    step = model(x[:, :-1], use_cache=True)
    same(model(x[:, -1:], past_key_values=step.past_key_values).logits, expected[:, -1:], 1e-5)
    model.merge_adapter()
    same(model(x).logits, expected, 1e-5)
    assert base.config.tie_word_embeddings
    model.unmerge_adapter()
    assert torch.equal(model(x).logits, expected)
    with pytest.raises(ConfigError, match="must be the model's first"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)]))
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("again", config)
    assert torch.equal(model(x).logits, expected)
    model.unload()
    assert_untouched(base, whole | {"modes": snapshot(base)["modes"]})
    assert (base.config.num_hidden_layers, [layer.self_attn.layer_idx for layer in base.model.layers]) == (2, [0, 1])
    assert all(torch.equal(base.state_dict()[key], bits) for key, bits in before.items())
    merged_model = get_peft_model(base, config).eval()
    expected = merged_model(x).logits
    deep = merged_model.merge_and_unload()
    same(deep(x).logits, expected, 1e-5)
    deep.save_pretrained(tmp_path)
    same(type(deep).from_pretrained(tmp_path)(x).logits, expected, 1e-5)


def test_arrow_sends_each_token_to_the_adapters_it_points_to(tmp_path: Path) -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 5)})

    paths = []
    for i in range(4):
        model = get_peft_model(net(), variant())
        torch.nn.init.normal_(model.get_base_model()["linear"].lora_B["default"].weight)
        torch.nn.init.normal_(model.get_base_model()["linear"].lora_A["default"].weight)
        model.save_pretrained(tmp_path / str(i))
        paths.append(str(tmp_path / str(i)))
    config = ArrowConfig(top_k=2, router_temperature=0.5, use_gks=True)
    model = create_arrow_model(net(), paths[:3], config, paths[3:])
    layer = model.get_base_model()["linear"]
    x = torch.randn(7, 6)
    y, base = layer(x), layer.base_layer(x)
    general = [layer.lora_A["gks_0"].weight, layer.lora_B["gks_0"].weight]
    deltas, directions = [], []
    for i in range(3):
        A, B = layer.lora_A[f"task_{i}"].weight - general[0], layer.lora_B[f"task_{i}"].weight - general[1]
        deltas.append((B @ A).detach())
        directions.append(torch.linalg.svd(deltas[-1]).Vh[0])
    for row, out, plain in zip(x, y, base, strict=True):
        match = [abs(float(p @ row)) for p in directions]
        best = sorted(range(3), key=lambda i: -match[i])[:2]
        total = sum(math.exp(match[i] / 0.5) for i in best)
        expected = plain + sum(math.exp(match[i] / 0.5) / total * ALPHA / R * (deltas[i] @ row) for i in best)
        same(out, expected, 1e-5)
    model.set_adapter("task_1")
    same(layer(x), base + ALPHA / R * x @ (layer.lora_B["task_1"].weight @ layer.lora_A["task_1"].weight).T, 1e-5)
    with pytest.raises(ConfigError, match="`use_gks` needs"):
        create_arrow_model(net(), paths, config)
    with pytest.raises(ConfigError, match="`top_k` should be positive"):
        ArrowConfig(top_k=0)
