"""Supervised fine-tuning with LoRA and TRL.

python -m trimtab.as_peft trl_sft.py                   # with trimtab; nothing in this file knows of it
python trl_sft.py --model my-org/my-model              # with PEFT
"""

import argparse

from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import SENTENCES, make
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a model's folder or Hub id; by default a tiny random one is made")
parser.add_argument("--adapter", help="the folder of an adapter to go on from; by default a new one is made")
parser.add_argument("--output", default="runs/trl_sft", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

set_seed(0)
model, config = args.model or make(f"{args.output}/model"), None
if args.adapter:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"), args.adapter, is_trainable=True
    )
else:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        seed=0,
    ),
    train_dataset=Dataset.from_dict({"text": SENTENCES}),
    peft_config=config,
)
trainer.train()
trainer.save_model()
trainer.save_state()
