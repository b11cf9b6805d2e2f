"""SFT on text with TRL: the plan is graftkit's, everything else stays as it was.

Rows in train.jsonl: {"prompt": "def parse(text):", "completion": " Parse the text."}
Tests run it as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, rows of prompts as `train.jsonl`.
"""

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import graftkit as gk

MODEL = "Qwen/Qwen3-0.6B"

plan = gk.plan(MODEL, targets="all-linear", r=16, alpha=32)
print(plan)

rows = load_dataset("json", data_files="train.jsonl", split="train")
trainer = SFTTrainer(
    MODEL,
    args=SFTConfig(
        output_dir="out/text",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=rows,
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan, rows=rows)],
)
trainer.train()
trainer.save_model()
print(gk.check("out/text", base=MODEL))
