"""A model, whole or cut over processes by transformers (tp_plan), with an adapter: outputs, gradients, merging."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import trimtab

folder, fields = Path(sys.argv[1]), eval(sys.argv[2])
parallel = "RANK" in os.environ
if parallel:
    dist.init_process_group("gloo")
first = not parallel or dist.get_rank() == 0


def whole(t: Any) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


torch.manual_seed(0 if first else 1)
cut = {"tp_plan": "auto"} if parallel else {}
base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", **cut)
targets = ["embed_tokens", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
targets = targets[1:] if fields else targets  # an embedding has no bias; its merge is another test's
config = trimtab.LoraConfig(target_modules=targets, init_lora_weights=False, r=4, **fields)
model = trimtab.get_peft_model(base, config)
if parallel:  # what was drawn is the same everywhere
    for name, parameter in model.named_parameters():
        if ".default." in name:
            other = parameter.detach().clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, parameter), name
    model.load_adapter(folder / "alone", "read", is_trainable=True)
    model.set_adapter("read")
else:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder / "alone", save_embedding_layers=False)
ids = torch.arange(12).view(2, 6)
out = model(ids).logits
out.square().mean().backward()
gradients = {n.replace(".read", ".default"): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
found = {"out": whole(out), "gradients": gradients}
if "embed_tokens" not in config.target_modules:
    with torch.no_grad():
        model.merge_adapter()
        found["merged"] = whole(model(ids).logits)
        model.unmerge_adapter()
        found["unmerged"] = whole(model(ids).logits)
else:
    found["merged"] = found["unmerged"] = found["out"]
if parallel:
    how = {"save_embedding_layers": False, "is_main_process": first}
    model.save_pretrained(folder / "parts", selected_adapters=["read"], **how)
if first:
    torch.save(found, folder / ("parts.pt" if parallel else "alone.pt"))
if parallel:
    dist.destroy_process_group()
