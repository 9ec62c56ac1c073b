"""A store of adapters: heads alone are read, a few are on the model, and no two contents are mixed up."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import llama, logits, tokens
from trimtab import AdapterStore, LoraConfig, PeftModel, get_peft_model
from trimtab.errors import AdapterFileError, AdapterNameError, ConfigError

WEIGHTS = "adapter_model.safetensors"
IDS = tokens(vocabulary=60)


def write(folder: Path, seed: int, r: int = 2) -> None:
    """An adapter whose numbers follow from the seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(folder)


def alone(folder: Path) -> torch.Tensor:
    """What the adapter in a folder makes of the first row."""
    with torch.no_grad():
        return logits(PeftModel.from_pretrained(llama(), folder), IDS[:1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        write(tmp_path / "adapters" / f"task.{i}", i, r=1 + i % 3)  # a dot in a folder's name does no harm
    return tmp_path / "adapters"


def mixed(store: AdapterStore, model: Any, names: list[Any]) -> torch.Tensor:
    with store.using(model, names) as rows, torch.no_grad():
        return model(IDS[:1].expand(len(names), -1), adapter_names=rows).logits


def test_rows_are_answered_by_the_adapters_in_the_folders(root: Path) -> None:
    store = AdapterStore(root, limit=3)
    assert list(store) == [f"task.{i}" for i in range(6)]
    entry = store.entry("task.2")
    assert (entry.peft_type, entry.bytes) == ("LORA", (root / "task.2" / WEIGHTS).stat().st_size)
    model = store.open(llama())
    with torch.no_grad():
        base = logits(llama(), IDS[:1])
    for names in (["task.0", "task.5", "__base__"], ["task.1", "task.2", "task.3"], ["task.5", "task.5", "task.0"]):
        out = mixed(store, model, names)
        for row, name in zip(out, names, strict=True):
            torch.testing.assert_close(row[None], base if name == "__base__" else alone(root / name))
        assert store.on(model) == len(model.peft_config) <= 3
    scaled = mixed(store, model, [[("task.0", 0.0)], [("task.0", 1.0)]])
    torch.testing.assert_close(scaled[:1], base)
    torch.testing.assert_close(scaled[1:], alone(root / "task.0"))
    with store.using(model, ["task.4", "__base__"]) as rows:
        ids = model.generate(input_ids=IDS[:2], adapter_names=rows, max_new_tokens=3, do_sample=False)
    assert ids.shape == (2, IDS.shape[1] + 3)


def test_what_is_used_or_pinned_stays_and_the_oldest_leaves(root: Path) -> None:
    store = AdapterStore(root, limit=2)
    model = store.open(llama(), "task.0")
    store.pin("task.0")
    store.prefetch(model, ["task.1"])
    first = set(model.peft_config)
    store.prefetch(model, ["task.2"])
    assert len(model.peft_config) == 2
    assert len(first & set(model.peft_config)) == 1  # task.0
    store.unpin("task.0")
    with store.using(model, ["task.3"]), store.using(model, ["task.4"]):
        assert store.on(model) == 2
        with store.using(model, ["task.5"]):
            assert store.on(model) == 3  # none of the three may go now
    store.prefetch(model, ["task.5"])
    assert store.on(model) == 2
    with pytest.raises(AdapterNameError, match="wants 3 adapters at once, and `limit` is 2"):
        store.prefetch(model, ["task.0", "task.1", "task.2"])
    least = AdapterStore(root, max_bytes=1)
    model = least.open(llama())
    least.prefetch(model, ["task.3"])
    assert least.on(model) == 1


def test_a_changed_folder_is_another_adapter(root: Path) -> None:
    store = AdapterStore(root)
    model = store.open(llama())
    old = mixed(store, model, ["task.0", "task.1"])
    with store.using(model, ["task.0"]) as rows:
        write(root / "task.0", 77, r=4)  # while it is in use
        with torch.no_grad():
            again = model(IDS[:1], adapter_names=rows).logits
    torch.testing.assert_close(again, old[:1])
    new = mixed(store, model, ["task.0", "task.1"])
    torch.testing.assert_close(new[:1], alone(root / "task.0"))
    assert not torch.allclose(new[0], old[0])
    torch.testing.assert_close(new[1], old[1])
    write(root / "task.0", 78)
    assert store.refresh().changed == ("task.0",)


def test_equal_contents_are_held_once(root: Path) -> None:
    shutil.copytree(root / "task.0", root / "twin")
    store = AdapterStore(root)
    model = store.open(llama(), "task.0")
    out = mixed(store, model, ["task.0", "twin"])
    torch.testing.assert_close(out[0], out[1])
    assert len(model.peft_config) == 1


def test_folders_come_and_go(root: Path) -> None:
    store = AdapterStore(root)
    shutil.rmtree(root / "task.1")
    write(root / "late", 9)
    changes = store.refresh()
    assert (changes.new, changes.changed, changes.gone) == (("late",), (), ("task.1",))
    assert "task.1" not in store
    model = store.open(llama())
    shutil.rmtree(root / "task.2")
    with pytest.raises(AdapterNameError, match=r"'task.2' is not served: .*holds no adapter_config.json"):
        store.prefetch(model, ["task.2"])
    with pytest.raises(AdapterNameError, match=r"no adapter 'tusk.3'. Did you mean task.3"):
        store.prefetch(model, ["tusk.3"])


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])


def longer(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0")


def headless(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 40)


def unnamed(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def broken_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("harm", [cut, longer, headless, unnamed, broken_json, no_weights])
def test_half_written_folders_are_not_served_until_they_are_whole(harm: Any, root: Path) -> None:
    shutil.copytree(root / "task.3", root / "other")
    harm(root / "task.3")
    store = AdapterStore(root)
    assert "task.3" in store.broken
    assert "task.3" not in store
    with pytest.raises(AdapterNameError, match=r"'task.3' is not served: "):
        store.entry("task.3")
    shutil.rmtree(root / "task.3")
    (root / "other").rename(root / "task.3")
    assert store.refresh().new == ("task.3",)
    assert not store.broken


def test_an_adapter_that_does_not_fit_is_refused_by_name(root: Path) -> None:
    values = load_file(root / "task.1" / WEIGHTS)
    save_file({k: v[..., :-1].contiguous() for k, v in values.items()}, root / "task.1" / WEIGHTS)
    store = AdapterStore(root)
    model = store.open(llama(), "task.0")
    with pytest.raises(AdapterFileError, match=r"'task.1' cannot be loaded: .*size mismatch"):
        store.prefetch(model, ["task.1"])
    torch.testing.assert_close(mixed(store, model, ["task.0"]), alone(root / "task.0"))


def test_several_folders_and_one_that_is_an_adapter(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "more" / "task.0", 50)
    write(tmp_path / "single", 51)
    store = AdapterStore([root, tmp_path / "more", tmp_path / "single"])
    assert store.entry("task.0").folder == root / "task.0"
    assert store.entry("single").folder == tmp_path / "single"
    with pytest.raises(AdapterFileError, match="No such folder"):
        AdapterStore(tmp_path / "none")
    with pytest.raises(ConfigError, match="`limit` should be at least 1"):
        AdapterStore(root, limit=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNameError, match="The store is empty"):
        AdapterStore(tmp_path / "empty").open(llama())


def test_threads_share_a_store(root: Path) -> None:
    store = AdapterStore(root, limit=3)
    model = store.open(llama())
    expected = {name: alone(root / name) for name in store}
    lock, wrong = threading.Lock(), []

    def work(names: list[str]) -> None:
        for name in names * 3:
            with lock:  # a model computes for one thread at a time
                out = mixed(store, model, [name])
            if not torch.allclose(out, expected[name], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(list(store)[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_heads_alone_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are none are found when the adapter is loaded, not when it is registered."""
    values = load_file(root / "task.4" / WEIGHTS)
    next(iter(values.values())).fill_(float("nan"))
    save_file(values, root / "task.4" / WEIGHTS)
    store = AdapterStore(root)
    assert "task.4" in store
    with pytest.raises(AdapterFileError, match=r"'task.4' cannot be loaded: .*NaN"):
        store.prefetch(store.open(llama(), "task.0"), ["task.4"])
    assert json.loads((root / "task.4" / "adapter_config.json").read_text())["peft_type"] == "LORA"
