"""SFT on the standard library's docstrings, from signature to summary line: plain, with experts, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training import gemma
from tests.training.proof import on_fresh_base, reloaded, run, text_batch
from tests.training.small import docstrings, save_model, trained_tokenizer, write_recipe

ARGS = {
    "max_steps": 60,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 6,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "eval_on_start": True,
    "save_strategy": "no",
    "use_cpu": True,
}


def samples(count: int, start: str = "") -> list[dict[str, str]]:
    return [{"prompt": start + signature, "completion": f" {summary}"} for signature, summary in docstrings(count)]


def texts(rows: list[dict[str, str]]) -> list[str]:
    return [row["prompt"] + row["completion"] for row in rows]


@pytest.fixture(scope="module")
def letters() -> Any:
    """Return a tokenizer of 256 letters, which nothing of the summaries has shaped."""
    return trained_tokenizer([], 259)


def test_losses_fall_on_rows_seen_and_unseen(tmp_path: Path, letters: Any) -> None:
    rows = samples(600)
    base = save_model(tmp_path / "base", letters)
    recipe = write_recipe(
        tmp_path / "sft.json", base, rows, adapter={"r": 16, "alpha": 32}, data={"eval_share": 0.1}, args=ARGS
    )
    result, model = run(recipe)
    loss, held_out = result.curve("loss"), result.curve("eval_loss")
    assert loss[-1][1] < 0.8 * loss[0][1]
    assert held_out[-1][1] < 0.7 * held_out[0][1]
    assert result.metrics["eval_loss"] == held_out[-1][1]
    stock = reloaded(model, base, result.folder, text_batch(letters, texts(rows[:4])))
    assert stock.faithful


def test_experts_learn(tmp_path: Path) -> None:
    """Gemma 4 26B-A4B in small: two stacks of experts as bare parameters, beside attention."""
    rows = samples(300, "<bos>")
    tokenizer = gemma.letters()
    base = gemma.save_base(tmp_path / "base", tokenizer, "google/gemma-4-26B-A4B-it")
    adapter = {"targets": ["experts", "attention"]}
    args = {
        **ARGS,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    result, model = run(write_recipe(tmp_path / "moe.json", base, rows, adapter=adapter, args=args))
    loss = result.curve("loss")
    assert loss[-1][1] < 0.85 * loss[0][1]
    assert result.plan is not None
    assert set(result.plan.peft_config.target_parameters) == {"gate_up_proj", "down_proj"}
    ups = {name: up.detach() for name, up in model.named_parameters() if "lora_B" in name}
    experts = [name for name in ups if "experts" in name]
    assert len(experts) == 2 * model.config.text_config.num_hidden_layers
    assert all(up.any() for up in ups.values())
    stock = reloaded(model, base, result.folder, text_batch(tokenizer, texts(rows[:4])))
    assert stock.faithful


def test_a_packed_base_learns_and_what_is_not_packed_is_not_upcast(tmp_path: Path) -> None:
    """QLoRA: the language tower's linears in nf4; experts, embeddings and norms stay in 16 bit."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows = samples(300, "<bos>")
    tokenizer = gemma.letters()
    base = gemma.save_base(tmp_path / "base", tokenizer, "google/gemma-4-26B-A4B-it", dtype=torch.bfloat16)
    args = {
        **ARGS,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    adapter = {"targets": ["attention", "mlp"]}
    recipe = write_recipe(tmp_path / "qlora.json", base, rows, quantization="4bit", adapter=adapter, args=args)
    result, model = run(recipe)
    loss = result.curve("loss")
    assert loss[-1][1] < 0.85 * loss[0][1]
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    packed = {name for name, weight in frozen.items() if isinstance(weight, bitsandbytes.nn.Params4bit)}
    # Seven linears a layer; one of the two layers has no value projection (attention_k_eq_v).
    assert len(packed) == 13
    assert all(".language_model.layers." in name for name in packed)
    kept = {name: weight.dtype for name, weight in frozen.items() if name not in packed}
    assert any("experts" in name for name in kept)
    assert any("embed_tokens" in name for name in kept)
    assert set(kept.values()) == {torch.bfloat16}
    stock = reloaded(on_fresh_base(model, base), base, result.folder, text_batch(tokenizer, texts(rows[:4])))
    assert stock.faithful
