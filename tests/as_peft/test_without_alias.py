"""`from trimtab import ...` without the alias: a plain loop, accelerate, and the Trainer. In a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.as_peft import tiny

ROOT = Path(__file__).resolve().parents[2]

START = """
import sys, torch
from trimtab import LoraConfig, PeftModel, TaskType, get_peft_model
from tests.as_peft import tiny

config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"])
model = get_peft_model(tiny.llama(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
ids, losses = tiny.batch(8), []
"""

LOOP = """
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
"""

ACCELERATE = """
from accelerate import Accelerator
from accelerate.utils import is_peft_available
assert not is_peft_available()
accelerator = Accelerator(cpu=True)
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(8):
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
accelerator.save_state(sys.argv[1] + "/state")
accelerator.load_state(sys.argv[1] + "/state")
model = accelerator.unwrap_model(model)
"""

TRAINER = """
from datasets import Dataset
from transformers import Trainer, TrainingArguments
args = TrainingArguments(
    sys.argv[1] + "/run", max_steps=8, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1, report_to=[],
    use_cpu=True, save_strategy="no",
)
data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
"""

END = """
assert losses[-1] < losses[0], losses
assert "peft" not in sys.modules
model.save_pretrained(sys.argv[1])
again = PeftModel.from_pretrained(tiny.llama(), sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
"""


def test_training_and_saving(tmp_path):
    environment = tiny.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", "".join(START + how + END for how in (LOOP, ACCELERATE, TRAINER)), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
