"""Numbers that cannot be meant are found in files of one piece as one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.models import toy
from trimtab import LoraConfig, get_peft_model
from trimtab.errors import AdapterFileError
from trimtab.files import store
from trimtab.files.soundness import joined


@settings(deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=12), st.randoms())
def test_joined_tensors_hold_the_same_numbers(parts: list[tuple[int, int, bool]], random: object) -> None:
    """Views of one tensor with gaps between them, of two formats, transposed or not, and tensors of their own."""
    whole, at, tensors = torch.arange(200.0), 0, []
    for rows, gap, turned in parts:
        view = whole[at : at + 2 * rows].view(rows, 2)
        tensors.append(view.T if turned else view)
        at += 2 * rows + gap
    tensors += [torch.full((2,), -1.0), torch.full((0,), -2.0), whole.view(torch.int32)[190:194], whole[194:196]]
    random.shuffle(tensors)  # type: ignore[attr-defined]
    found = joined(tensors)
    assert len(found) <= len(tensors)
    numbers = lambda ts: sorted(n for t in ts for n in t.flatten().tolist())
    assert numbers(found) == numbers(tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_the_one_tensor_of_a_file_that_is_damaged_is_named(value: float, tmp_path: Path) -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up", "head"])).eval()
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / store.WEIGHTS)
    for damaged in whole:
        tensors = {k: v.clone() for k, v in whole.items()}
        tensors[damaged].view(-1)[-1] = value
        save_file(tensors, tmp_path / store.WEIGHTS)
        with pytest.raises(AdapterFileError) as error:
            model.load_adapter(tmp_path, "loaded")
        assert damaged in str(error.value)
        assert not any(other in str(error.value) for other in whole if other != damaged)
