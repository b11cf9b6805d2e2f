"""GRPO with TRL and a reward of one's own.

Rows in sums.jsonl: {"prompt": "3 + 4 =", "answer": "7"}
Tests run it as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, sums as `sums.jsonl`.
"""

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import graftkit as gk

MODEL = "Qwen/Qwen3-0.6B"


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward an answer that has the number, and a little one that is short."""
    return [float(a in c.split()) - 0.001 * len(c) for c, a in zip(completions, answer, strict=True)]


plan = gk.plan(MODEL, targets="all-linear", r=16, alpha=32)
trainer = GRPOTrainer(
    MODEL,
    reward_funcs=right,
    args=GRPOConfig(
        output_dir="out/grpo",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-5,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files="sums.jsonl", split="train"),
    peft_config=plan.peft_config,
    callbacks=[gk.Guard(plan)],
)
trainer.train()
trainer.save_model()
print(gk.check("out/grpo", base=MODEL))
