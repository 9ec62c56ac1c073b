"""EVA over several processes, each of which sees its own part of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import llama
from trimtab import EvaConfig, LoraConfig, get_eva_state_dict

CONFIG = LoraConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig(tau=0.5), target_modules=["q_proj", "o_proj"])


def rows(process: int) -> Tensor:
    return torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(process))


def vectors(*ids: Tensor) -> dict[str, Tensor]:
    return get_eva_state_dict(llama(), [{"input_ids": torch.cat(ids)}], CONFIG, show_progress_bar=False)


def work(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=process, world_size=2)
    with pytest.warns(UserWarning, match="gather tensors from all ranks"):
        found: Any = vectors(rows(process))
    alone = get_eva_state_dict(llama(), [{"input_ids": rows(process)}], CONFIG, gather_distributed_inputs=False)
    torch.save((found, alone), f"{folder}/{process}")
    torch.distributed.destroy_process_group()


def test_all_processes_find_the_vectors_of_all_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    wanted = vectors(rows(0), rows(1))
    for process in (0, 1):
        found, alone = torch.load(tmp_path / str(process))
        assert found.keys() == wanted.keys()
        for name, A in wanted.items():
            torch.testing.assert_close(found[name], A)
        for name, A in vectors(rows(process)).items():
            torch.testing.assert_close(alone[name], A)
