"""An adapter's folder: written whole, read strictly, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.contract.cases import move, tensors
from tests.models import assert_untouched, classifier, gpt2, llama, logits, snapshot, tokens, toy
from trimtab import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from trimtab.errors import AdapterFileError, AdapterNameError, PeftWarning
from trimtab.files import store

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = tokens()


def adapted() -> PeftModel:
    model = get_peft_model(toy(), CONFIG).eval()
    move(model, "default")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Any) -> None:
    values = load_file(folder / store.WEIGHTS)
    change(values)
    save_file(values, folder / store.WEIGHTS)


# ---------------------------------------------------------------------- layout
def test_the_default_adapter_is_at_the_root_and_others_in_folders(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", CONFIG)
    model.save_pretrained(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        "second", "second/adapter_config.json", "second/adapter_model.safetensors",
    ]  # fmt: skip
    assert store.saved_adapters(tmp_path) == ["default", "second"]
    with safe_open(tmp_path / store.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == [f"base_model.model.{m}.lora_{x}.weight" for m in ("head", "up") for x in "AB"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_selected_adapters(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", CONFIG)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert store.saved_adapters(tmp_path) == ["second"]
    with pytest.raises(ValueError, match=r"invalid `selected_adapters`.*'third'"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "README.md")


@pytest.mark.usefixtures("parked")
def test_parked_adapters_are_saved_and_loaded_like_the_others(tmp_path: Path) -> None:
    """More adapters than stay in the module tree; embeddings too, whose tensors are no modules."""
    model = adapted()
    for i in range(14):
        model.add_adapter(f"a{i}", LoraConfig(r=2, target_modules=["embed", "up"], init_lora_weights=False))
    expected = {}
    for i in range(14):
        model.set_adapter(f"a{i}", inference_mode=True)
        expected[f"a{i}"] = model.eval()(IDS)
    assert any(adapter.parked for adapter in model.graft.adapters.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    for name, output in expected.items():
        loaded.load_adapter(tmp_path / name, name)
        assert (
            get_peft_model_state_dict(loaded, adapter_name=name).keys()
            == get_peft_model_state_dict(model, adapter_name=name).keys()
        )
        loaded.set_adapter(name)
        assert torch.equal(loaded(IDS), output)
    state = get_peft_model_state_dict(model, adapter_name="a0")
    for value in state.values():
        value.data.mul_(2)
    assert set_peft_model_state_dict(model, state, "a0").missing_keys == []


def test_saving_in_the_other_format_replaces_the_first(folder: Path) -> None:
    adapted().save_pretrained(folder, safe_serialization=False)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    adapted().save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_users_own_words_in_the_card_are_kept(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    adapted().save_pretrained(folder)
    assert card.read_text().endswith("My own words.\n")
    assert card.read_text().count("library_name: peft") == 1


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_tensors_that_share_storage_are_written_once_each(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    store.save(store.writers(tmp_path, LoraConfig(), {"a": one, "b": one, "c": one.view(2, 3)}))
    assert torch.equal(load_peft_weights(tmp_path)["c"], one.view(2, 3))


# ---------------------------------------------------------------------- what does not fit
def spoil(values: dict[str, torch.Tensor]) -> None:
    del values["base_model.model.up.lora_A.weight"]
    values["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 2)
    values["base_model.model.head.lora_B.weight"] = torch.zeros(9, 2)


FAULTS = [
    r"missing keys .*up\.lora_A",
    r"unexpected keys .*nowhere\.lora_A",
    r"size mismatch: .*head\.lora_B\.weight is \(9, 2\) in the file and \(7, 2\)",
]


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load_adapter onto one that is there"])
def test_all_faults_in_one_error_and_nothing_changed(how: str, folder: Path) -> None:
    edit(folder, spoil)
    base = toy()
    if how == "from_pretrained":
        before = snapshot(base)
        with pytest.raises(AdapterFileError) as caught:
            PeftModel.from_pretrained(base, folder)
        assert_untouched(base, before)
        assert all(p.requires_grad for p in base.parameters())
    else:
        model = get_peft_model(base, CONFIG).eval()
        move(model, "default")
        before = snapshot(model)
        with pytest.raises(AdapterFileError) as caught:
            model.load_adapter(folder, "default" if "there" in how else "new")
        assert_untouched(model, before)
        assert list(model.peft_config) == ["default"]
    for fault in FAULTS:
        assert re.search(fault, str(caught.value)), fault


def test_strict_false_loads_what_fits(folder: Path) -> None:
    edit(folder, spoil)
    with pytest.raises(AdapterFileError, match="size mismatch"):  # a wrong shape is no matter of taste
        PeftModel.from_pretrained(toy(), folder, strict=False)
    with pytest.warns(PeftWarning) as caught:
        model = PeftModel.from_pretrained(toy(), folder, strict=False, ignore_mismatched_sizes=True)
    said = " ".join(str(w.message) for w in caught)
    assert "missing adapter keys" in said
    assert "unexpected keys" in said
    theirs, ours = tensors(adapted()), tensors(model)
    same = {n for n in ours if torch.equal(ours[n], theirs[n])}
    assert {n.split("model.model.")[1] for n in set(ours) - same} == {
        "up.lora_A.default.weight",
        "head.lora_B.default.weight",
    }
    assert not any(p.is_meta for p in model.parameters())


def test_set_peft_model_state_dict_reports_and_does_not_raise(folder: Path) -> None:
    model = adapted()
    state = get_peft_model_state_dict(model)
    spoil(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*head\.lora_B"):
        set_peft_model_state_dict(model, state)
    with pytest.warns(PeftWarning, match=r"ignored because you passed `ignore_mismatched_sizes=True`.*\(9, 2\)"):
        found = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    keys = ["base_model.model.up.lora_A.default.weight", "base_model.model.head.lora_B.default.weight"]
    assert found.missing_keys == keys  # of the file, or of the model's shape
    assert found.unexpected_keys == ["base_model.model.nowhere.lora_A.weight"]


# ---------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("size", [0, 4, 40, -1, -100])
def test_truncated_safetensors(size: int, folder: Path) -> None:
    path = folder / store.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    base = toy()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors' cannot be read; it is truncated"):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / store.WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"):
        PeftModel.from_pretrained(toy(), folder)


class Evil:
    """What a pickle can do to the one who opens it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickled(folder: Path, content: Any, plain: bool = False) -> None:
    (folder / store.WEIGHTS).unlink()
    if plain:
        (folder / store.PICKLED).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / store.PICKLED)


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle.dumps"])
def test_a_malicious_pickle_is_refused_and_not_run(plain: bool, folder: Path) -> None:
    mark = folder / "it-ran"
    pickled(folder, {"base_model.model.up.lora_A.weight": Evil(mark)}, plain)
    with pytest.raises(AdapterFileError, match="cannot be read as a file of tensors and nothing else"):
        PeftModel.from_pretrained(toy(), folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, torch.zeros(2)], ids=["list", "text", "tensor"])
def test_a_pickle_of_something_else(content: Any, folder: Path) -> None:
    pickled(folder, content)
    with pytest.raises(AdapterFileError, match="holds something else than a dict of tensors"):
        load_peft_weights(folder)


def test_a_good_pickle_loads(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(PeftModel.from_pretrained(toy(), tmp_path)(IDS), model(IDS))
    path = tmp_path / store.PICKLED
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AdapterFileError, match="cannot be read"):
        load_peft_weights(tmp_path)


def test_a_config_of_a_newer_version_loads_and_keeps_its_fields(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1, "peft_version": "1.2.3"}))
    with pytest.warns(PeftWarning, match="from_the_future"):
        model = PeftModel.from_pretrained(toy(), folder)
    assert torch.equal(model(IDS), adapted()(IDS))
    model.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "adapter_config.json").read_text())["from_the_future"] == 1


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["a.b", "a/b", "a\\b", "..", ".", "", "a\0b", None, 3, "__base__"])
def test_names_that_cannot_name_a_folder_and_a_module(name: Any, folder: Path) -> None:
    base = toy()
    before = snapshot(base)
    with pytest.raises(AdapterNameError):
        get_peft_model(base, CONFIG, adapter_name=name)
    assert_untouched(base, before)
    model = adapted()
    for add in (lambda: model.add_adapter(name, CONFIG), lambda: model.load_adapter(folder, name)):
        with pytest.raises(AdapterNameError):
            add()


# ---------------------------------------------------------------------- what goes along
def test_heads_are_saved_whole(tmp_path: Path) -> None:
    model = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", r=2)).eval()
    move(model, "default")
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in load_peft_weights(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    ids = tokens(2, 5, 60)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), logits(classifier(), ids))


def test_adapted_embeddings_take_their_base_along(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).eval()
    move(model, "default")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "with")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_peft_weights(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not [k for k in load_peft_weights(tmp_path / "without") if "base_layer" in k]
    ids = tokens(2, 5, 64)
    for name in ("with", "without"):
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / name), ids), logits(model, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_are_saved_as_rows(tied: bool, tmp_path: Path) -> None:
    build = gpt2 if tied else llama
    targets = ["c_attn"] if tied else ["q_proj"]
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=targets, trainable_token_indices=[1, 7])).eval()
    move(model, "default")
    model.save_pretrained(tmp_path)
    rows = {k: v for k, v in load_peft_weights(tmp_path).items() if "token" in k and "lora" not in k}
    place = "transformer.wte" if tied else "model.embed_tokens"
    assert {k: tuple(v.shape) for k, v in rows.items()} == {
        f"base_model.model.{place}.token_adapter.trainable_tokens_delta": (2, 16)
    }
    ids = tokens(2, 5, 20)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert PeftConfig.from_pretrained(tmp_path).trainable_token_indices == [1, 7]
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    if tied:
        base = loaded.unload()
        assert base.lm_head.weight is base.transformer.wte.weight


def test_an_adapter_of_a_resized_vocabulary(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    assert load_peft_weights(tmp_path / "adapter")["base_model.model.model.embed_tokens.weight"].shape == (70, 16)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    again.resize_token_embeddings(70)
    ids = torch.tensor([[65, 66, 69]])
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter"), ids), logits(model.eval(), ids))


def test_key_mapping_renames_on_load(folder: Path) -> None:
    def older(values: dict[str, torch.Tensor]) -> None:
        for key in list(values):
            values[key.replace(".up.", ".wi.")] = values.pop(key)

    edit(folder, older)
    with pytest.raises(AdapterFileError, match="unexpected"):
        PeftModel.from_pretrained(toy(), folder)
    model = PeftModel.from_pretrained(toy(), folder, key_mapping={r"\.wi\.": ".up."})
    assert torch.equal(model(IDS), adapted()(IDS))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changed_the_base_becomes_a_plain_lora(name: str, rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=name, use_rslora=rslora, target_modules=["up", "down"])
    model = get_peft_model(toy(), config).eval()
    model.save_pretrained(tmp_path / "start")
    move(model, "default")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    plain = PeftModel.from_pretrained(toy(), tmp_path / "plain")
    assert plain.peft_config["default"].r == 4
    assert plain.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.base_model.model.up.base_layer.weight, toy().up.weight)


# ---------------------------------------------------------------------- reading
FORMATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("odd", [[], [torch.complex64], [torch.float8_e4m3fn]], ids=["plain", "complex", "eight_bits"])
def test_tensors_are_read_as_safetensors_reads_them(odd: list[torch.dtype], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (1,), (7,), (2, 1, 3)]
    tensors = {f"{d}.{i}": (9 * torch.randn(s)).to(d) for d in [*FORMATS, *odd] for i, s in enumerate(shapes)}
    save_file(tensors, tmp_path / store.WEIGHTS, metadata={"format": "pt"})
    own, theirs = load_peft_weights(tmp_path), load_file(tmp_path / store.WEIGHTS)
    assert own.keys() == theirs.keys() == tensors.keys()
    for key, value in own.items():
        assert (value.dtype, value.shape, value.device) == (theirs[key].dtype, theirs[key].shape, theirs[key].device)
        assert torch.equal(value.reshape(-1).view(torch.uint8), theirs[key].reshape(-1).view(torch.uint8))
        assert value.is_contiguous()


def test_numbers_that_lie_across_the_boundaries_of_their_format_are_read(tmp_path: Path) -> None:
    """Some programs do not fill up the head to a multiple of eight."""
    head = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}})
    head += " " * (3 - len(head) % 4)
    values = torch.tensor([1.5, -2.0, 3.25])
    content = len(head).to_bytes(8, "little") + head.encode() + values.numpy().tobytes()
    (tmp_path / store.WEIGHTS).write_bytes(content)
    assert torch.equal(load_peft_weights(tmp_path)["a"], values)


def test_what_is_read_can_be_changed_and_the_file_stays(folder: Path) -> None:
    before = (folder / store.WEIGHTS).read_bytes()
    for tensor in load_peft_weights(folder).values():
        tensor.fill_(7)
    assert (folder / store.WEIGHTS).read_bytes() == before
