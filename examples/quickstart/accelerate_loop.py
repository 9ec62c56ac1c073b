"""A training loop of one's own with LoRA and accelerate.

python -m trimtab.as_peft accelerate_loop.py           # with trimtab; nothing in this file knows of it
python accelerate_loop.py --model my-org/my-model      # with PEFT
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import SENTENCES, make
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a model's folder or Hub id; by default a tiny random one is made")
parser.add_argument("--adapter", help="the folder of an adapter to go on from; by default a new one is made")
parser.add_argument("--output", default="runs/accelerate_loop", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

accelerator = Accelerator()
set_seed(0)
name = args.model or make(f"{args.output}/model")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

if args.adapter:
    model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
else:
    model = get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )

set_seed(0)  # the order of the rows and the dropout, whatever making the model has drawn
rows = [tokenizer(text + tokenizer.eos_token) for text in SENTENCES]
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
losses = []
while len(losses) < args.steps:
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
        if len(losses) == args.steps:
            break

accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
if accelerator.is_main_process:
    (Path(args.output) / "losses.json").write_text(json.dumps(losses))
