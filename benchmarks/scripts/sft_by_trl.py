"""Supervised fine-tuning as one writes it with TRL and PEFT: ``sft_by_trl.py BASE ROWS ARGUMENTS.json``."""

import json
import sys
from pathlib import Path

from clock import Clock
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base, rows, arguments = sys.argv[1:]
data = load_from_disk(rows)
if "images" in data.column_names:
    model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
else:
    model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    layers = "all-linear"
clock = Clock()
trainer = SFTTrainer(
    model=model_class.from_pretrained(base, dtype="auto"),
    args=SFTConfig(**json.loads(Path(arguments).read_text())),
    train_dataset=data,
    processing_class=processor_class.from_pretrained(base),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"),
    callbacks=[clock],
)
trainer.train()
trainer.save_model()
assert "graftkit" not in sys.modules
clock.tell()
