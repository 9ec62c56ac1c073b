"""Every test: one thread, the same random numbers, no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ["HF_HUB_OFFLINE"] = "1"
os.fsync = os.fstat  # it waits for the disk, 4 ms each of thousands: what tests write need not outlast the machine

gc.disable()  # what is imported and collected stays: to look it through again and again takes 5 s of each process

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down the stack for each absent device: 2 ms


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone, for what shards."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=["aside", "data"])
def parked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapters are that leave the module tree: modules beside it, or numbers only."""
    if request.param == "data":
        monkeypatch.setattr("trimtab.graft.residents.ASIDE", 0)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what runs often and does not look at loss.png: to draw it takes half of a run of four steps."""

    def touched(result: object, path: Path, title: str) -> Path:
        path.touch()
        return path

    monkeypatch.setattr("trimtab.train.assembly.plot_losses", touched)
