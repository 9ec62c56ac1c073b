"""Resizing against the SVD of the full delta: each choice of ranks, what is lost, what is written, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.models import AttentionNet, ConvNet, mixtral, tokens, toy
from tests.rank.adapters import LAYERS, dense, loaded, lora, saved
from tests.rank.test_adapter_file import EXPERTS, WEIGHTS, edit, edit_config
from trimtab import resize_adapter
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.files.codec import PREFIX
from trimtab.rank.adapter_file import AdapterFile

SIX = {"r": 6, "target_modules": LAYERS}


def best(D: Tensor, rank: int) -> Tensor:
    """The best approximation of a matrix, or of each of a stack."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert (found - wanted).norm() <= tolerance * wanted.norm().clamp_min(1)


# ---------------------------------------------------------------------- one rank
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_cut_to_a_rank_is_the_best_approximation(rank: int, tmp_path: Path) -> None:
    model = lora(**SIX, alpha_pattern={"up": 3}, rank_pattern={"head": 5})
    old, report = dense(model), resize_adapter(saved(tmp_path, model), rank=rank, output=tmp_path / "new")
    again = loaded(tmp_path / "new")
    new = dense(again)
    assert new.keys() == old.keys() == {x.path for x in report.layers}
    for layer in report.layers:
        near(new[layer.path], best(old[layer.path], rank))
        assert layer.norm == pytest.approx(float(old[layer.path].norm()), rel=1e-5)
        assert layer.error == pytest.approx(float((old[layer.path] - new[layer.path]).norm()), abs=1e-5 * layer.norm)
        assert layer.relative == pytest.approx(layer.error / layer.norm)
        assert (layer.old_rank, layer.rank) == (5 if layer.path == "head" else 6, rank)
    config = again.peft_config["default"]
    assert (config.r, config.rank_pattern) == (rank, {})
    whole = math.sqrt(
        sum(float((old[p] - new[p]).norm()) ** 2 for p in old) / sum(float(d.norm()) ** 2 for d in old.values())
    )
    assert report.relative == pytest.approx(whole, rel=1e-4)


def test_to_the_true_rank_nothing_is_lost(tmp_path: Path) -> None:
    """Rows that repeat: a pair of rank 6 whose delta has 2."""

    def repeat(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if "lora_A" in k or "embedding_A" in k]:
            tensors[key] = tensors[key][torch.tensor([0, 1, 0, 1, 0, 1])].contiguous()

    edit(saved(tmp_path, **SIX), repeat)
    old = dense(loaded(tmp_path))
    for chosen in ({"rank": 2}, {"energy": 1.0}, {"global_energy": 1.0}):
        report = resize_adapter(tmp_path, **chosen, output=tmp_path / "new")
        assert {x.rank for x in report.layers} == {2}
        assert report.relative < 1e-6
        new = dense(loaded(tmp_path / "new"))
        for path, D in old.items():
            near(new[path], D)


def test_grown_it_is_exactly_the_same_and_trains_on(tmp_path: Path) -> None:
    model = lora(r=3, lora_alpha=6, target_modules=LAYERS, use_rslora=True)
    resize_adapter(saved(tmp_path, model), rank=9, output=tmp_path / "new")  # more than some layers have rows
    again = trimtab.PeftModel.from_pretrained(toy(), tmp_path / "new", is_trainable=True)
    assert again.peft_config["default"].r == 9
    old, new = dense(model), dense(again)
    assert all(torch.allclose(new[path], old[path], atol=1e-15) for path in old)
    assert torch.allclose(again.eval()(tokens()), model(tokens()), atol=1e-6)
    again(tokens()).square().sum().backward()
    for name, parameter in again.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            assert parameter.grad[:, 3:].abs().sum() > 0, name  # the new columns are no dead end


def test_a_layer_of_that_rank_keeps_its_bits(tmp_path: Path) -> None:
    old = AdapterFile.read(saved(tmp_path, r=3, rank_pattern={"up": 6}))
    resize_adapter(tmp_path, rank=3, output=tmp_path / "new")
    new = AdapterFile.read(tmp_path / "new").tensors
    assert {k for k, t in old.tensors.items() if not torch.equal(t, new[k])} == {
        f"{PREFIX}up.lora_A.weight",
        f"{PREFIX}up.lora_B.weight",
    }


def test_half_precision_stays(tmp_path: Path) -> None:
    edit(saved(tmp_path, **SIX), lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    old = dense(loaded(tmp_path))
    resize_adapter(tmp_path, rank=4, output=tmp_path / "new")
    assert {t.dtype for t in AdapterFile.read(tmp_path / "new").tensors.values()} == {torch.bfloat16}
    for path, D in dense(loaded(tmp_path / "new")).items():
        near(D, best(old[path], 4), 1e-2)


def test_experts_and_groups(tmp_path: Path) -> None:
    """The matrices of a stack have one rank; each is cut by itself."""
    torch.manual_seed(0)
    for base, fields, rank in (
        (mixtral, {**EXPERTS, "rank_pattern": {"experts.gate_up_proj": 8}, "r": 4}, 2),
        (lambda: ConvNet(groups=2), {"target_modules": ["one", "two"], "r": 4}, 2),
    ):
        folder = tmp_path / str(len(fields))
        torch.manual_seed(0)
        model = lora(base(), **fields)
        report = resize_adapter(saved(folder, model), rank=rank, output=folder / "new")
        torch.manual_seed(0)
        old, new = dense(model), dense(loaded(folder / "new", base()))
        for layer in report.layers:
            D, cut = old[layer.path], new[layer.path]
            if base is not mixtral:
                D, cut = D.unflatten(0, (2, -1)), cut.unflatten(0, (2, -1))
            near(cut, best(D, rank // (1 if base is mixtral else 2)))
            assert layer.error == pytest.approx(float((D - cut).norm()), abs=1e-5)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    """W' = m·(W + dW) / ||W + dW|| with dW cut: the rows keep their length."""
    model = lora(r=6, target_modules=["up"], use_dora=True)
    resize_adapter(saved(tmp_path, model), rank=2, output=tmp_path / "new")
    again = loaded(tmp_path / "new")
    key = f"{PREFIX}up.lora_magnitude_vector"
    m = AdapterFile.read(tmp_path).rest[key]
    assert torch.equal(AdapterFile.read(tmp_path / "new").rest[key], m)
    pair = AdapterFile.read(tmp_path).pairs["up"]
    W = toy().up.weight.detach().double()
    direction = W + best(pair.scale * (pair.B @ pair.A)[0].double(), 2)
    wanted = m.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    near(W + dense(again)["up"], wanted, 1e-5)
    assert not torch.allclose(again(tokens()), model(tokens()), atol=1e-3)


# ---------------------------------------------------------------------- layer by layer, and over all layers
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_energy_of_each_layer(share: float, tmp_path: Path) -> None:
    old = dense(lora(**SIX))
    report = resize_adapter(saved(tmp_path, **SIX), energy=share, output=tmp_path / "new")
    for layer in report.layers:
        S = torch.linalg.svdvals(old[layer.path]).square()
        held = S.cumsum(0) / S.sum()
        assert layer.rank == int((held < share).sum()) + 1
    config = loaded(tmp_path / "new").peft_config["default"]
    for layer in report.layers:
        assert config.resolve(layer.path).r == layer.rank


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_energy_of_all_layers_keeps_the_largest_of_all(share: float, tmp_path: Path) -> None:
    """One threshold: every value that stays is at least as large as every one that goes. No other choice of as many
    components loses less."""
    model = lora(**SIX)
    with torch.no_grad():  # layers of unlike size
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name and "_B" in name:
                parameter.mul_(3.0 ** -(i % 5))
    old = dense(model)
    report = resize_adapter(saved(tmp_path, model), global_energy=share, output=tmp_path / "new")
    ranks = {x.path: x.rank for x in report.layers}
    values = {p: torch.linalg.svdvals(D) for p, D in old.items()}
    stay = torch.cat([values[p][:r] for p, r in ranks.items()])
    go = torch.cat([values[p][r:6] for p, r in ranks.items()])
    assert stay.min() >= go.max()
    whole = stay.square().sum() + go.square().sum()
    assert stay.square().sum() >= share * whole > stay.square().sum() - stay.min() ** 2
    assert 0 in ranks.values() or share == 0.9  # a layer with nothing to say is left out
    new = dense(loaded(tmp_path / "new"))
    assert new.keys() == {p for p, r in ranks.items() if r}
    for path, D in new.items():
        near(D, best(old[path], ranks[path]))


@pytest.mark.parametrize("size", [1600, 2600, 3600, 10**6])
def test_a_file_of_some_size(size: int, tmp_path: Path) -> None:
    """It fits, and the next component would not; no uniform rank that fits loses less."""
    report = resize_adapter(saved(tmp_path, **SIX), max_size=size, output=tmp_path / "new")
    used = (tmp_path / "new" / WEIGHTS).stat().st_size
    assert used <= size
    if size == 10**6:
        assert report.relative < 1e-6
        return
    assert used > size - 900  # names in the header are counted generously
    for rank in range(1, 7):
        uniform = resize_adapter(tmp_path, rank=rank, output=tmp_path / "uniform")
        if (tmp_path / "uniform" / WEIGHTS).stat().st_size <= used:
            assert uniform.relative >= report.relative


def test_a_large_file_is_filled(tmp_path: Path) -> None:
    base = torch.nn.Sequential(*[torch.nn.Linear(200, 300) for _ in range(4)])
    saved(tmp_path, lora(base, r=16, target_modules=["0", "1", "2", "3"]))
    resize_adapter(tmp_path, max_size=60_000, output=tmp_path / "new")
    assert 60_000 - 4 * 500 - 900 < (tmp_path / "new" / WEIGHTS).stat().st_size <= 60_000


def test_what_belongs_to_a_layer_keeps_it_in(tmp_path: Path) -> None:
    """Layers with a magnitude or a bias, and experts, whose keys count each other, keep a rank of 1."""
    for i, fields in enumerate(({"lora_bias": True, "target_modules": ["up", "head"]}, {"use_dora": True})):
        report = resize_adapter(
            saved(tmp_path / str(i), **{**SIX, **fields}), global_energy=0.05, output=tmp_path / "n"
        )
        assert min(x.rank for x in report.layers) == 1
        loaded(tmp_path / "n")
    torch.manual_seed(0)
    report = resize_adapter(
        saved(tmp_path / "moe", lora(mixtral(), **EXPERTS)), global_energy=0.05, output=tmp_path / "n"
    )
    assert min(x.rank for x in report.layers) == 1
    loaded(tmp_path / "n", mixtral())


def test_one_layer_only(tmp_path: Path) -> None:
    for chosen in ({"rank": 1}, {"energy": 0.5}, {"global_energy": 0.5}, {"max_size": 480}):
        report = resize_adapter(saved(tmp_path, r=4, target_modules=["up"]), **chosen, output=tmp_path / "new")
        assert len(report.layers) == 1
        assert 1 <= report.layers[0].rank < 4
        loaded(tmp_path / "new")


def test_heads_and_tokens_come_along(tmp_path: Path) -> None:
    fields = {"target_modules": ["up"], "modules_to_save": ["head"], "trainable_token_indices": {"embed": [1, 2]}}
    model = lora(**fields)
    resize_adapter(saved(tmp_path, model), energy=1.0, output=tmp_path / "new")
    assert torch.allclose(loaded(tmp_path / "new")(tokens()), model(tokens()), atol=1e-5)


# ---------------------------------------------------------------------- what is written, and said
def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    before = sorted(p.name for p in saved(tmp_path).iterdir())
    report = resize_adapter(tmp_path, rank=1)
    assert report.output is None
    assert report.parameters < report.old_parameters
    assert report.bytes < report.old_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_scores_are_taken_before_and_after_even_in_place(tmp_path: Path) -> None:
    ranks = []

    def score(folder: Any) -> float:
        ranks.append(AdapterFile.read(folder).config.r)
        return float(len(ranks))

    report = resize_adapter(saved(tmp_path, r=4), rank=2, output=tmp_path, score=score)
    assert ranks == [4, 2]
    assert (report.old_score, report.score) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="name an output"):
        resize_adapter(tmp_path, rank=1, score=score)


# ---------------------------------------------------------------------- degenerate and refused
def test_zeros(tmp_path: Path) -> None:
    """A LoRA as it starts has no delta: cut or grown it still has none, and no share of nothing can be kept."""
    trimtab.get_peft_model(toy(), trimtab.LoraConfig(target_modules=["up", "head"])).save_pretrained(tmp_path)
    for rank in (2, 20):
        assert resize_adapter(tmp_path, rank=rank, output=tmp_path / "new").relative == 0
        assert not any(D.any() for D in dense(loaded(tmp_path / "new")).values())
    for chosen in ({"energy": 0.9}, {"global_energy": 0.9}):
        with pytest.raises(ConfigError, match=r"changes nothing.*only `rank`"):
            resize_adapter(tmp_path, **chosen)


def test_a_layer_of_zeros_is_left_out(tmp_path: Path) -> None:
    edit(saved(tmp_path, target_modules=["up", "head"]), lambda t: t[f"{PREFIX}head.lora_B.weight"].zero_())
    for chosen in ({"energy": 0.9}, {"global_energy": 0.9}, {"max_size": 10**6}):
        report = resize_adapter(tmp_path, **chosen, output=tmp_path / "new")
        assert {x.path: x.rank > 0 for x in report.layers} == {"up": True, "head": False}
        assert dense(loaded(tmp_path / "new")).keys() == {"up"}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "none was given"),
        ({"rank": 2, "energy": 0.9}, "rank and energy was given"),
        ({"rank": 0}, "positive"),
        ({"rank": 2.5}, "positive"),
        ({"energy": 0.0}, "share"),
        ({"energy": 95}, "share"),
        ({"global_energy": 1.5}, "share"),
        ({"max_size": 100}, "100 bytes is too small: the least this adapter can have is"),
    ],
)
def test_choices_that_cannot_be_met(chosen: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resize_adapter(tmp_path, **chosen, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_least_size_that_is_named_can_be_had(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match="too small") as caught:
        resize_adapter(tmp_path, max_size=10)
    least = int(str(caught.value).rsplit(" ", 1)[1].rstrip(".").replace(",", ""))
    assert sum(x.rank for x in resize_adapter(tmp_path, max_size=least).layers) == 1


def test_adapters_that_have_no_rank_to_change(tmp_path: Path) -> None:
    trimtab.get_peft_model(toy(), trimtab.LoHaConfig(target_modules=["up"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(AdapterFileError, match="LOHA"):
        resize_adapter(tmp_path / "loha", rank=2)
    with pytest.raises(AdapterFileError, match="pissa"):
        resize_adapter(saved(tmp_path / "pissa", target_modules=["up"], init_lora_weights="pissa"), rank=2)


def test_ranks_that_a_reader_could_not_tell_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(tmp_path / "moe", lora(mixtral(), **EXPERTS))
    config = {"target_parameters": ["experts.first", "experts.second"]}
    with pytest.raises(ConfigError, match=r"does not say which parameter of 'model.layers.0.mlp.experts'"):
        resize_adapter(edit_config(folder, **config), energy=0.5)


def test_experts_of_an_older_transformers(tmp_path: Path) -> None:
    """They are read as one parameter today, with one rank: that is kept, others are refused."""

    def rename(tensors: dict[str, Tensor]) -> None:
        stem = f"{PREFIX}block_sparse_moe.experts."
        for i in range(3):
            for name in ("w1", "w2", "w3"):
                tensors[f"{stem}{i}.{name}.lora_A.weight"] = torch.randn(4, 6)
                tensors[f"{stem}{i}.{name}.lora_B.weight"] = torch.randn(8, 4)

    folder = edit_config(edit(saved(tmp_path, target_modules=["up"]), rename), target_modules=["w1", "w2", "w3", "up"])
    assert {x.rank for x in resize_adapter(folder, rank=2).layers} == {2}
    with pytest.raises(ConfigError, match="older transformers"):
        resize_adapter(folder, energy=0.9)


def test_a_grouped_convolution_has_ranks_of_its_groups(tmp_path: Path) -> None:
    folder = saved(tmp_path, lora(ConvNet(groups=2), target_modules=["one"]))
    with pytest.raises(ConfigError, match="multiple of its groups: 3"):
        resize_adapter(folder, rank=3)


def test_an_attentions_projections_have_one_rank(tmp_path: Path) -> None:
    """A config names the attention, not what comes along with it: the smaller one is grown."""
    torch.manual_seed(0)
    model = lora(AttentionNet(), r=6, target_modules=["self_attn"])
    old = dense(model)
    report = resize_adapter(saved(tmp_path, model), global_energy=0.6, output=tmp_path / "new")
    assert len({x.rank for x in report.layers}) == 1
    torch.manual_seed(0)
    again = loaded(tmp_path / "new", AttentionNet())
    assert again.peft_config["default"].rank_pattern == {}
    new = dense(again)
    for layer in report.layers:
        if layer.path == "self_attn":
            assert layer.error == pytest.approx(float((old[layer.path] - new[layer.path]).norm()), rel=1e-4)
    ranked = saved(
        tmp_path / "named", lora(AttentionNet(), target_modules=["self_attn"], rank_pattern={"self_attn": 2})
    )
    assert {x.old_rank for x in resize_adapter(ranked, rank=1).layers} == {2}
    with pytest.raises(ConfigError, match="have one rank"):
        resize_adapter(tmp_path, max_size=2000)
