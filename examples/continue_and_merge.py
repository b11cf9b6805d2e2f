"""Go on with an adapter that exists, on new rows, and merge what comes of it.

Rows in train.jsonl: {"prompt": "def parse(text):", "completion": " Parse the text."}
Tests run it as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, rows of prompts as `train.jsonl`, an adapter
for `Qwen/Qwen3-0.6B` as `first`.
"""

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import graftkit as gk

MODEL = "Qwen/Qwen3-0.6B"

# Is it whole, and made for this base? An adapter that matches nothing would train from nothing, silently.
report = gk.check("first", base=MODEL)
if report.errors:
    raise SystemExit(str(report))

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), "first", is_trainable=True)
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir="out/second",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=5e-5,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    callbacks=[gk.Guard()],
)
trainer.train()
trainer.save_model()

print(gk.merge(MODEL, "out/second", "out/merged"))
