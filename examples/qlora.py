"""QLoRA with TRL: the plan says what stays in 16 bit, and gives the configuration to load the base with.

Rows in chat.jsonl: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
Tests run it as it is, with a wide twin as `google/gemma-4-31B-it`, conversations as `chat.jsonl`.
"""

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import graftkit as gk

MODEL = "google/gemma-4-31B-it"

plan = gk.plan(MODEL, targets="all-linear", scope=["language"], r=16, alpha=32, quantization="4bit")
print(plan.quantization)

model = AutoModelForImageTextToText.from_pretrained(
    MODEL, quantization_config=plan.quantization_config, dtype=torch.bfloat16
)
trainer = SFTTrainer(
    model,
    processing_class=AutoProcessor.from_pretrained(MODEL),
    args=SFTConfig(
        output_dir="out/qlora",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="chat.jsonl", split="train"),
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan)],
)
trainer.train()
trainer.save_model()

# Into the published 16-bit weights, not into the quantized ones.
print(gk.merge(MODEL, "out/qlora", "out/qlora-merged"))
