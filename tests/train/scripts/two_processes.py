"""What each of two processes runs under FSDP 2: a run, and the same again, stopped after step 3 and resumed.

Usage: torchrun --nproc-per-node 2 two_processes.py folder '{"data": ..., ...}'
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from trimtab.train.folder import read_run
from trimtab.train.loop import Event
from trimtab.train.processes import Several
from trimtab.train.report import console_for
from trimtab.train.run import run_training

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    cpu_ram_efficient_loading=False,
)
accelerator = Accelerator(cpu=True)
# accelerate turns FSDP on beside accelerators only; sharding itself works on CPUs over gloo, too
PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
accelerator.state.fsdp_plugin = plugin


class StopAt(Event):
    """Ends the run with this step, as Ctrl-C does; in all of them the model must be sharded."""

    def __init__(self, at: int) -> None:
        self.at = at

    def gradients(self, run) -> None:
        assert all(isinstance(p, DTensor) for p in run.model.parameters())
        if run.step + 1 == self.at:
            run.stop = "interrupted"


def train(output: str, *events: Event, **changes) -> list:
    config, _ = read_run({**settings, "output": str(folder / output), **changes})
    return run_training(config, console_for(quiet=True), Several(accelerator), events=events).result.losses


whole = train("whole", StopAt(-1))
train("broken", StopAt(3))
again = train("broken", resume=True)
if accelerator.is_main_process:
    (folder / "losses.json").write_text(json.dumps({"whole": whole, "again": again}))
accelerator.wait_for_everyone()
accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # threads of gloo may still run when Python takes its modules down, and then abort
