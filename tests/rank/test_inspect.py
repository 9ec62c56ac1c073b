"""Inspecting and comparing adapters by their files alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.folders import adapter_folder, base_folder
from trimtab import IA3Config, LoraConfig
from trimtab.errors import AdapterFileError
from trimtab.files.factors import Factors
from trimtab.rank.inspect import _spectrum, diff, inspect

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = base_folder(root / "base")
    adapter_folder(root / "a", base, seed=1)
    adapter_folder(root / "b", base, seed=2)
    adapter_folder(root / "zero", base, size=0)
    return root


def rewrite(source, target, change):
    """A copy of an adapter with its tensors changed."""
    target.mkdir()
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS)
    return target


sizes = st.integers(1, 8)


@given(st.integers(0, 10**6), sizes, sizes, sizes, st.floats(0.1, 5), st.integers(1, 3))
def test_singular_values_are_the_dense_ones(seed, r, out, into, scale, n) -> None:
    draw = torch.Generator().manual_seed(seed)
    stack = (n,) if n > 1 else ()
    A = torch.randn(*stack, r, into, generator=draw, dtype=torch.float64)
    B = torch.randn(*stack, out, r, generator=draw, dtype=torch.float64)
    dense = torch.linalg.svdvals(scale * B @ A).flatten().sort(descending=True).values
    found = _spectrum(Factors(A, B, scale))
    k = min(len(found), len(dense))
    torch.testing.assert_close(found[:k], dense[:k], rtol=1e-9, atol=1e-9)
    assert float(found[k:].sum()) < 1e-9


def test_an_adapter_is_read_whole(folders) -> None:
    found = inspect(folders / "a")
    tensors = load_file(folders / "a" / WEIGHTS)
    assert (found.method, found.task, found.base) == ("LORA", "CAUSAL_LM", str(folders / "base"))
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.bytes == (folders / "a" / WEIGHTS).stat().st_size
    assert found.dtypes == {"float32": found.parameters}
    assert len(found.layers) == 14
    assert not found.faults
    for layer in found.layers:
        A, B = (tensors[f"base_model.model.{layer.path}.lora_{x}.weight"].double() for x in "AB")
        values = torch.linalg.svdvals(2 * B @ A)[:4]
        shares = values / values.sum()
        assert (layer.rank, layer.scale, layer.shape) == (4, 2.0, (len(B), A.shape[1]))
        assert layer.norm == pytest.approx(float((2 * B @ A).norm()))
        assert layer.largest == pytest.approx(float(values[0]))
        assert layer.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2))
        assert layer.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
        assert 1 <= layer.stable_rank <= layer.effective_rank**2
        assert layer.effective_rank <= 4 + 1e-9
    assert found.norm == pytest.approx(math.hypot(*(x.norm for x in found.layers)))


def test_an_adapter_as_it_starts_changes_nothing(folders) -> None:
    found = inspect(folders / "zero")
    assert found.norm == 0
    assert any("changes nothing" in fault for fault in found.faults)
    assert {x.effective_rank for x in found.layers} == {0.0}


def test_one_layer_that_stays_is_a_note(folders, tmp_path) -> None:
    def still(tensors):
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].zero_()

    found = inspect(rewrite(folders / "a", tmp_path / "x", still))
    assert not found.faults
    assert "1 of 14 layers change nothing: model.layers.0.mlp.up_proj" in found.notes[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_a_fault_that_names_the_tensor(folders, tmp_path, value) -> None:
    def spoil(tensors):
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = value

    found = inspect(rewrite(folders / "a", tmp_path / "x", spoil))
    assert "1 of 28 tensors: model.layers.1.self_attn.q_proj.lora_A.weight" in found.faults[0]


def test_an_empty_file_is_a_fault(folders, tmp_path) -> None:
    found = inspect(rewrite(folders / "a", tmp_path / "x", lambda tensors: tensors.clear()))
    assert found.faults == ["there is no tensor in it"]


def test_a_method_without_factors_shows_its_tensors(folders, tmp_path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapter_folder(tmp_path / "ia3", folders / "base", config=config)
    found = inspect(tmp_path / "ia3")
    assert (found.method, found.layers, found.faults) == ("IA3", [], [])
    assert len(found.rest) == 2


def test_a_damaged_file_and_no_adapter_are_errors(folders, tmp_path) -> None:
    rewrite(folders / "a", tmp_path / "x", lambda tensors: None)
    whole = (tmp_path / "x" / WEIGHTS).read_bytes()
    (tmp_path / "x" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterFileError, match="cannot be read"):
        inspect(tmp_path / "x")
    with pytest.raises(AdapterFileError, match="whole model"):
        inspect(folders / "base")


def test_provenance_is_shown_where_it_is(folders, tmp_path) -> None:
    rewrite(folders / "a", tmp_path / "x", lambda tensors: None)
    assert inspect(tmp_path / "x").provenance is None
    (tmp_path / "x" / "trimtab.json").write_text(json.dumps({"base_model": {"name": "b"}}))
    assert inspect(tmp_path / "x").provenance == {"base_model": {"name": "b"}}
    (tmp_path / "x" / "trimtab.json").write_text("no json")
    assert inspect(tmp_path / "x").provenance is None


# ---------------------------------------------------------------------- two adapters
def deltas(folder):
    tensors = load_file(folder / WEIGHTS)
    stems = sorted({k.partition(".lora_")[0] for k in tensors})
    pairs = {s: [tensors[f"{s}.lora_{x}.weight"].double() for x in "AB"] for s in stems}
    return {s.removeprefix("base_model.model."): 2 * B @ A for s, (A, B) in pairs.items()}


def test_cosines_and_interference_are_the_dense_ones(folders) -> None:
    found = diff(folders / "a", folders / "b")
    a, b = deltas(folders / "a"), deltas(folders / "b")
    assert [p.path for p in found.pairs] == list(a)
    for pair in found.pairs:
        x, y = a[pair.path], b[pair.path]
        assert pair.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-9)
        reads = torch.linalg.svd(x)[2][:4]  # what a reads
        assert pair.into_first == pytest.approx(float((y @ reads.T).norm() / x.norm()), rel=1e-6)
        reads = torch.linalg.svd(y)[2][:4]
        assert pair.into_second == pytest.approx(float((x @ reads.T).norm() / y.norm()), rel=1e-6)
    x, y = (torch.cat([d.flatten() for d in side.values()]) for side in (a, b))
    assert found.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-9)
    assert found.norms == pytest.approx((float(x.norm()), float(y.norm())))
    assert not found.identical


def test_the_same_adapter_twice(folders) -> None:
    found = diff(folders / "a", folders / "a")
    assert found.identical
    assert (found.cosine, found.into_first) == pytest.approx((1.0, 1.0))
    assert not found.config
    assert not any(found.only)


def test_an_adapter_and_its_opposite_cancel(folders, tmp_path) -> None:
    def opposite(tensors):
        for key in tensors:
            if ".lora_B." in key:
                tensors[key] = -tensors[key]

    found = diff(folders / "a", rewrite(folders / "a", tmp_path / "x", opposite))
    assert found.cosine == pytest.approx(-1.0)


def test_adapters_of_other_layers_ranks_and_bases(folders, tmp_path) -> None:
    other = base_folder(tmp_path / "other", intermediate_size=40)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"], task_type="CAUSAL_LM")
    adapter_folder(tmp_path / "c", other, config=config)
    found = diff(folders / "a", tmp_path / "c")
    assert found.config["r"] == (4, 2)
    assert found.unequal == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert {p.path for p in found.pairs} == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert found.only[1] == ["lm_head"]
    assert any("different base models" in note for note in found.notes)


def test_nothing_against_something_has_no_angle(folders) -> None:
    found = diff(folders / "zero", folders / "a")
    assert math.isnan(found.cosine)
    assert found.norms[0] == 0


def test_a_list_in_another_order_is_no_difference(folders, tmp_path) -> None:
    rewrite(folders / "a", tmp_path / "x", lambda tensors: None)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    config["target_modules"].reverse()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    assert not diff(folders / "a", tmp_path / "x").config
