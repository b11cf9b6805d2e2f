"""Recipes of examples/ on small models and a few rows: what they save, and what they measure on held-out rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training import gemma
from tests.training.proof import run
from tests.training.small import save_model, trained_tokenizer, write_rows
from tests.training.tones import save_tones

from graftkit.demo.processor import known_to_transformers

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def text(folder: Path) -> tuple[Path, str, Any]:
    write_rows(folder / "train.jsonl", [{"prompt": f"def f{n}(x):", "completion": f" Is {n}."} for n in range(40)])
    return save_model(folder / "base", trained_tokenizer([], 259)), "train.jsonl", None


def chat(folder: Path) -> tuple[Path, str, Any]:
    pytest.importorskip("bitsandbytes")
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]
    write_rows(folder / "chat.jsonl", [{"messages": turns} for _ in range(40)])
    made = gemma.letters(chat_template=gemma.template())
    # The small E2B has linears of 8 outputs, and bitsandbytes packs no fewer than 32 on a CPU with AVX512-BF16.
    return gemma.save_base(folder / "base", made, "google/gemma-4-31B-it"), "chat.jsonl", None


def audio(folder: Path) -> tuple[Path, str, Any]:
    made = gemma.processor(gemma.template())
    rows = save_tones(folder / "numbers", 40, seed=0)
    messages = [
        {
            "prompt": [{"role": "user", "content": "Which tone?"}],
            "completion": [{"role": "assistant", "content": t}],
        }
        for t in rows["completion"]
    ]
    columns = {name: [row[name] for row in messages] for name in ("prompt", "completion")}
    rows = rows.remove_columns(list(columns))
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    rows.save_to_disk(folder / "sounds")
    return gemma.save_base(folder / "base", made), "sounds", made


CASES: dict[str, Callable[[Path], tuple[Path, str, Any]]] = {
    "text": text,
    "qlora": chat,
    "audio": audio,
}


@pytest.mark.parametrize("name", CASES)
def test_examples_run(tmp_path: Path, name: str) -> None:
    shutil.copy(EXAMPLES / f"{name}.yaml", tmp_path)
    base, data, processor = CASES[name](tmp_path)
    assert f"path: {data}" in (tmp_path / f"{name}.yaml").read_text()
    args = {**SMALL, "output_dir": str(tmp_path / "out")}
    changes = [f"model={base}", *(f"args.{key}={value}" for key, value in args.items())]
    if processor is None:
        result, _ = run(tmp_path / f"{name}.yaml", *changes)
    else:
        with known_to_transformers(processor):
            result, _ = run(tmp_path / f"{name}.yaml", *changes)
    assert result.steps == 2
    assert "eval_loss" in result.metrics
    assert (result.folder / "adapter_model.safetensors").is_file()
    if name != "text":
        kept = [
            *result.folder.glob("chat_template.jinja"),
            *result.folder.glob("checkpoint-*/chat_template.jinja"),
        ]
        assert {file.read_text() for file in kept} == {gemma.template()}
    assert json.dumps(result.to_dict())
