"""DPO with TRL: the reference is the base with the adapter off, so that no second model is loaded.

Rows in preferences.jsonl: {"prompt": "…", "chosen": "…", "rejected": "…"}
Tests run it as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, pairs of answers as `preferences.jsonl`.
"""

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

import graftkit as gk

MODEL = "Qwen/Qwen3-0.6B"

plan = gk.plan(MODEL, targets="all-linear", r=16, alpha=32)
trainer = DPOTrainer(
    MODEL,
    args=DPOConfig(
        output_dir="out/dpo",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=5e-6,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train"),
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan)],
)
trainer.train()
trainer.save_model()
print(gk.check("out/dpo", base=MODEL))
