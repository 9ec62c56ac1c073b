"""Adapters read and written without a model: every kind of layer, every key, and what is wrong with a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from tests.models import ConvNet, gpt_oss, mixtral, tokens, toy
from tests.rank.adapters import LAYERS, dense, loaded, lora, saved
from trimtab.errors import AdapterFileError
from trimtab.files.codec import PREFIX
from trimtab.rank.adapter_file import AdapterFile, common
from trimtab.rank.changes import changes, read_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MIXED = {
    "rank_pattern": {"up": 3, "embed": 2},
    "alpha_pattern": {"head": 5},
    "use_rslora": True,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "every kind": (toy, {"target_modules": LAYERS}),
    "ranks and scales": (toy, {"target_modules": LAYERS, **MIXED}),
    "bias and head": (toy, {"target_modules": ["up"], "lora_bias": True, "modules_to_save": ["head"]}),
    "dora": (toy, {"target_modules": ["up", "down"], "use_dora": True}),
    "groups": (lambda: ConvNet(groups=2), {"target_modules": ["one", "two", "point"]}),
    "experts": (mixtral, EXPERTS),
    "experts of two ranks": (mixtral, {**EXPERTS, "rank_pattern": {"experts.gate_up_proj": 6}}),
    "one parameter": (mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "a router": (mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "flipped experts": (gpt_oss, {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: Any) -> Any:
    base, fields = request.param
    torch.manual_seed(0)
    return lora(base(), **{"r": 4, **fields})


def test_what_is_read_is_written(case: Any, tmp_path: Path) -> None:
    """Bit by bit, under the same keys."""
    file = AdapterFile.read(saved(tmp_path, case))
    old = load_file(tmp_path / WEIGHTS)
    assert file.tensors.keys() == old.keys()
    assert all(torch.equal(file.tensors[k], old[k]) for k in old)
    file.write(tmp_path / "again")
    new = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(new[k], old[k]) for k in old)


def test_factors_are_those_of_the_formula(case: Any, tmp_path: Path) -> None:
    """s·B·A as matrices is what the model's own formula adds to each weight."""
    file = AdapterFile.read(saved(tmp_path, case))
    if file.config.use_dora:  # its change is no product: the pair is that of the direction
        assert {f"{p.stem}.lora_magnitude_vector" for p in file.pairs.values()} == file.rest.keys()
        return
    wanted = dense(case)
    assert file.pairs.keys() == wanted.keys()
    for path, pair in file.pairs.items():
        D = pair.scale * pair.B.double() @ pair.A.double()
        assert torch.allclose(D.reshape(wanted[path].shape), wanted[path], atol=1e-5), path
        if pair.form != "groups":
            assert pair.shape == tuple(wanted[path].shape)


def test_of_a_model_is_of_its_files(case: Any, tmp_path: Path) -> None:
    files, live = AdapterFile.read(saved(tmp_path, case)).tensors, read_model(case, "default").tensors
    assert files.keys() == live.keys()
    assert all(torch.equal(files[k], live[k]) for k in files)


def test_an_attention_means_the_same_on_disk(tmp_path: Path) -> None:
    """PEFT adds an output projection's product twice: its B is halved in the file."""
    torch.manual_seed(0)
    from tests.models import AttentionNet

    model = lora(AttentionNet(), target_modules=["self_attn"])
    file = AdapterFile.read(saved(tmp_path, model))
    wanted = dense(model)
    assert file.pairs.keys() == wanted.keys() == {"self_attn", "self_attn.out_proj"}
    for path, times in (("self_attn", 1), ("self_attn.out_proj", 2)):
        pair = file.pairs[path]
        assert torch.allclose(times * pair.scale * (pair.B @ pair.A)[0].double(), wanted[path], atol=1e-5)


def test_a_config_says_each_layers_rank_and_keeps_its_scale(tmp_path: Path) -> None:
    file = AdapterFile.read(saved(tmp_path, target_modules=LAYERS, **MIXED))
    again = file.with_pairs(file.pairs)
    config = again.config
    assert (config.r, config.use_rslora) == (4, False)
    assert config.rank_pattern == {"up": 3, "embed": 2}
    for path, pair in file.pairs.items():
        own = config.resolve(path)
        assert own.r == pair.rank
        assert own.scaling() == pytest.approx(pair.scale, rel=1e-12)
    again.write(tmp_path / "again")
    old, new = loaded(tmp_path), loaded(tmp_path / "again")
    assert torch.allclose(old(tokens()), new(tokens()), atol=1e-6)
    assert "README.md" in {p.name for p in (tmp_path / "again").iterdir()}


def test_a_pattern_fits_its_own_layer_only(tmp_path: Path) -> None:
    """A path that ends a longer one: "up" and "inner.up"."""

    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.up = toy(), torch.nn.Linear(7, 7)

        def forward(self, ids: Any) -> Any:
            return self.up(self.inner(ids))

    model = lora(Nested(), target_modules=["up"])
    file = AdapterFile.read(saved(tmp_path, model))
    from dataclasses import replace

    small = replace(file.pairs["up"], A=file.pairs["up"].A[:, :1], B=file.pairs["up"].B[..., :1])
    config = file.with_pairs({**file.pairs, "up": small}).config
    assert config.resolve("up").r == 1
    assert config.resolve("inner.up").r == 4


def test_whole_alphas_are_whole(tmp_path: Path) -> None:
    file = AdapterFile.read(saved(tmp_path, lora_alpha=16, target_modules=["up"]))
    alpha = file.with_pairs(file.pairs).config.lora_alpha
    assert alpha == 16
    assert isinstance(alpha, int)


def test_the_most_frequent() -> None:
    assert common([3, 5, 3, 5, 1]) == 5
    assert common([2]) == 2


# ---------------------------------------------------------------------- faults
def edit(folder: Path, change: Any) -> Path:
    """The folder after its tensors were changed."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


UP = f"{PREFIX}up.lora_A.weight"
FAULTS = {
    "empty": (lambda t: t.clear(), "holds no tensor"),
    "no pair": (lambda t: [t.pop(k) for k in list(t) if "lora" in k], "no pair of factors"),
    "half a pair": (lambda t: t.pop(UP), r"up.lora_B' has no other factor"),
    "nan": (lambda t: t[UP].__setitem__((0, 0), math.nan), "'up' has a NaN"),
    "infinity": (lambda t: t[UP].__setitem__((0, 0), math.inf), "'up' has a NaN or an infinity"),
    "another rank": (lambda t: t.update({UP: t[UP][:3].clone()}), r"'up' has rank 4 by the config, but an A \(3, 6\)"),
    "a vector": (lambda t: t.update({UP: t[UP][0].clone()}), r"'up' has rank 4 .* A \(6,\)"),
    "kasa": (lambda t: t.update({f"{PREFIX}up.lora_diag": torch.ones(4)}), "lora_diag' belongs to a formula"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_of_tensors_are_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, target_modules=["up", "head"], modules_to_save=["norm"])
    with pytest.raises(AdapterFileError, match=message):
        AdapterFile.read(edit(folder, change))


def test_all_faults_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[UP][0, 0] = math.nan
        tensors.pop(f"{PREFIX}head.lora_B.weight")
        tensors[f"{PREFIX}down.lora_A.weight"] = torch.ones(9, 9)

    with pytest.raises(AdapterFileError, match=r"(?s)head.*(up.*down|down.*up)"):
        AdapterFile.read(edit(saved(tmp_path), change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_qalora": True}, "QA-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"r": 5}, "rank 5 by the config"),
    ],
)
def test_configs_that_are_no_plain_lora(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=message):
        AdapterFile.read(edit_config(saved(tmp_path), **fields))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=CONFIG):
        AdapterFile.read(tmp_path)
    folder = saved(tmp_path)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        AdapterFile.read(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match="Can't find weights"):
        AdapterFile.read(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=CONFIG):
        AdapterFile.read(folder)


def test_another_method_is_named(tmp_path: Path) -> None:
    trimtab.get_peft_model(toy(), trimtab.LoHaConfig(target_modules=["up"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"is LOHA, not LORA.*base model"):
        AdapterFile.read(tmp_path)


def test_a_start_that_changed_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path, target_modules=["up"], init_lora_weights="pissa")
    with pytest.raises(AdapterFileError, match=r"'pissa'.*path_initial_model_for_weight_conversion"):
        AdapterFile.read(folder).require_own_base()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = AdapterFile.read(saved(tmp_path))
    with pytest.raises(AdapterFileError, match="is a file"):
        file.write(tmp_path / CONFIG)


def test_changes_are_in_the_models_order() -> None:
    assert [c.path for c in changes(lora(), "default")] == [n for n, _ in toy().named_modules() if n in LAYERS]
