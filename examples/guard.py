"""Guard in a trainer that is neither graftkit's nor TRL's: transformers' own, with rows tokenized by hand.

It looks before the first step, watches while it trains, reads every save back, and stops a run that goes wrong.
Tests run it as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, rows of prompts as `train.jsonl`.
"""

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import graftkit as gk

recipe = gk.read_recipe("guard.yaml")
tokenizer = AutoTokenizer.from_pretrained(recipe.fields.model)
model = AutoModelForCausalLM.from_pretrained(recipe.fields.model)

plan = recipe.plan(gk.survey(model))
model = gk.attach(model, plan)

rows = load_dataset("json", data_files="train.jsonl", split="train")
rows = rows.map(
    lambda row: tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token),
    remove_columns=rows.column_names,
)
guard = gk.Guard(plan)
trainer = Trainer(
    model,
    args=TrainingArguments(**recipe.args, num_train_epochs=1, logging_steps=1, bf16=torch.cuda.is_available()),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[guard],
)
trainer.train()
trainer.save_model()
print(guard.report)
