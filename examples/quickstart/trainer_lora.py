"""Fine-tune a language model with LoRA and the Hugging Face Trainer.

python -m trimtab.as_peft trainer_lora.py              # with trimtab; nothing in this file knows of it
python trainer_lora.py --model my-org/my-model         # with PEFT
"""

import argparse

from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tiny import SENTENCES, make
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a model's folder or Hub id; by default a tiny random one is made")
parser.add_argument("--adapter", help="the folder of an adapter to go on from; by default a new one is made")
parser.add_argument("--output", default="runs/trainer_lora", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

set_seed(0)
name = args.model or make(f"{args.output}/model")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

if args.adapter:
    model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
else:
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(model, config)
model.print_trainable_parameters()

data = Dataset.from_dict({"text": SENTENCES})
data = data.map(lambda row: tokenizer(row["text"] + tokenizer.eos_token), remove_columns="text")

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
trainer.save_state()
