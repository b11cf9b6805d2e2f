"""The same run with unsloth's kernels, on text and a GPU: ``sft_by_unsloth.py BASE ROWS ARGUMENTS.json``."""

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel  # before the others: it changes them

# isort: split
from clock import Clock
from datasets import load_from_disk
from trl import SFTConfig, SFTTrainer

base, rows, arguments = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=1024, load_in_4bit=False)
layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=layers)
clock = Clock()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**json.loads(Path(arguments).read_text())),
    train_dataset=load_from_disk(rows),
    processing_class=tokenizer,
    callbacks=[clock],
)
trainer.train()
trainer.save_model()
assert "graftkit" not in sys.modules
clock.tell()
