"""What each of two processes runs: train an adapter under DDP or FSDP 2, save and load its state, write what came out.

Usage: torchrun --nproc-per-node 2 two_processes.py (ddp | full | sharded) folder
"""

# isort: off
import trimtab.as_peft  # noqa: F401

# isort: on
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, load_fsdp_model, save_fsdp_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.tensor import DTensor

from tests.as_peft import tiny

how, folder = sys.argv[1], Path(sys.argv[2])
plugin = None
if how != "ddp":
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT" if how == "full" else "SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
accelerator = Accelerator(cpu=True)
if (
    plugin is not None
):  # accelerate turns FSDP on beside accelerators only; sharding itself works on CPUs over gloo, too
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def build():
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    model = get_peft_model(tiny.llama(), config)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


model, optimizer = accelerator.prepare(*build())
ids = tiny.batch(8)
mine = ids[accelerator.process_index :: accelerator.num_processes]


def step() -> float:
    loss = model(input_ids=mine, labels=mine).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss.detach(), "mean").item()


def whole() -> dict[str, torch.Tensor]:
    """The adapter's tensors, gathered: every process takes part."""
    tensors = get_peft_model_state_dict(accelerator.unwrap_model(model))
    assert all(isinstance(v, DTensor) == (how != "ddp") for v in tensors.values())
    return {k: v.full_tensor().detach() if isinstance(v, DTensor) else v.detach().clone() for k, v in tensors.items()}


losses = [step() for _ in range(3)]
state = whole()
if how == "ddp":
    accelerator.save_state(folder / "state")
else:
    save_fsdp_model(plugin, accelerator, model, folder / "state", adapter_only=True)
more = [step() for _ in range(2)]
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()
accelerator.wait_for_everyone()
if how == "ddp":
    accelerator.load_state(folder / "state")
else:
    load_fsdp_model(plugin, accelerator, model, folder / "state", adapter_only=True)
for key, value in whole().items():
    torch.testing.assert_close(value, state[key])
again = [step() for _ in range(2)]
unwrapped = accelerator.unwrap_model(model)
last = whole()
unwrapped.save_pretrained(folder / "adapter", is_main_process=accelerator.is_main_process)
# A state that was set back from whole tensors is the same on every process.
set_peft_model_state_dict(unwrapped, state)
for key, value in whole().items():
    torch.testing.assert_close(value, state[key])
set_peft_model_state_dict(unwrapped, last)
gathered = accelerator.get_state_dict(model)  # by all processes, for the first
unwrapped.save_pretrained(folder / "gathered", is_main_process=accelerator.is_main_process, state_dict=gathered)
if accelerator.is_main_process:
    torch.save({"losses": losses, "more": more, "again": again, "state": state, "last": last}, folder / "result.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # threads of gloo may still run when Python takes its modules down, and then abort
