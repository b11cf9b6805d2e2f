"""Pictures and text with Gemma 4 and TRL: language and vision tower adapted, clamps intact.

A folder of pictures with a metadata.jsonl, a file_name, prompt and completion a row; see image.yaml.
Tests run it as it is, with a twin as `google/gemma-4-E2B-it`, pictures as `pictures`.
"""

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import graftkit as gk

MODEL = "google/gemma-4-E2B-it"

plan = gk.plan(MODEL, targets="all-linear", scope=["language", "vision"], r=16, alpha=32)
trainer = SFTTrainer(
    MODEL,
    args=SFTConfig(
        output_dir="out/image",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_length=None,  # a truncated sample would lose tokens of its picture
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("imagefolder", data_dir="pictures", split="train"),
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan)],  # also measures how much is clamped, per tower
)
trainer.train()
trainer.save_model()
print(gk.check("out/image", base=MODEL))
