"""The experts of a mixture-of-experts model: planned, trained, and written as an engine reads them.

Rows in train.jsonl: {"prompt": "def parse(text):", "completion": " Parse the text."}
Tests run it as it is, with a twin of `qwen3_moe` as `Qwen/Qwen3-30B-A3B`, rows of prompts as `train.jsonl`.
"""

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import graftkit as gk

MODEL = "Qwen/Qwen3-30B-A3B"

plan = gk.plan(MODEL, targets=["all-linear", "experts"], r=8, alpha=16)
print(plan.peft_config.target_parameters)

trainer = SFTTrainer(
    MODEL,
    args=SFTConfig(
        output_dir="out/experts",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan)],
)
trainer.train()
trainer.save_model()

# vLLM reads experts in a layout of its own; what is written is read back, and each expert's update compared.
print(gk.convert("out/experts", "out/experts-vllm", to="vllm", base=MODEL))
