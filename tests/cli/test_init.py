"""``graft init``: the recipe that it writes is one that ``graft doctor`` passes, for what is there."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import fields_of, forked, graft, refused
from torch import nn
from transformers import AutoConfig, LlamaConfig

from graftkit.recipes.recipe import read_recipe

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(200)],
    "chat": [{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8,
    "plain": [{"content": "some text"}] * 8,
    "preferences": [{"question": "a", "chosen": "b", "rejected": "c"}] * 8,
    "numbers": [{"problem": "1 + 1", "answer": "2"}, {"problem": "600 + 600", "answer": "1,200"}] * 4,
}


@pytest.fixture
def base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    model: Any = twin_of("llama")
    model.config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rows(folder: Path, name: str) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return file


@pytest.mark.parametrize(
    ("name", "goal", "columns"),
    [
        ("alpaca", "sft", {"prompt": "instruction", "completion": "output"}),
        ("chat", "sft", {"messages": "conversations"}),
        ("plain", "sft", {"text": "content"}),
        ("preferences", "dpo", {"prompt": "question"}),
    ],
)
def test_the_recipe_passes_the_doctor(
    base: Path, tmp_path: Path, name: str, goal: str, columns: dict[str, str]
) -> None:
    file = rows(tmp_path, name)
    made = fields_of(forked("init", "--model", base, "--data", file.name, "--json", cwd=tmp_path))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.fields.trainer, recipe.fields.data.columns) == (goal, columns)
    assert made["recipe"] == (tmp_path / "recipe.yaml").read_text()
    assert recipe.fields.data.eval_share == (0.05 if len(ROWS[name]) > 100 else None)
    done = forked("doctor", "--recipe", "recipe.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_numbers_are_rewarded_as_numbers(base: Path, tmp_path: Path) -> None:
    file = rows(tmp_path, "numbers")
    graft("init", "--model", base, "--data", file, "--goal", "grpo", cwd=tmp_path)
    assert read_recipe(tmp_path / "recipe.yaml").fields.data.reward == "number_match"
    assert forked("doctor", "--recipe", "recipe.yaml", cwd=tmp_path).returncode == 0


def test_what_is_not_read_is_named(base: Path, tmp_path: Path) -> None:
    made = fields_of(forked("init", "--model", base, "--data", rows(tmp_path, "alpaca"), "--json", cwd=tmp_path))
    assert "not read: input" in made["reasons"]


@pytest.mark.parametrize(("memory", "quantization"), [("24", None), ("12", "4bit")])
def test_the_base_is_quantized_where_it_has_to_be(tmp_path: Path, memory: str, quantization: str | None) -> None:
    """Eight billion parameters: 16 GB in 16 bit, 6 GB in 4 bit with the embeddings in 16."""
    config = LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(tmp_path / "llama-8b")
    rows(tmp_path, "plain")
    done = forked("init", "--model", "llama-8b", "--data", "plain.jsonl", "--gpu-memory", memory, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_recipe(tmp_path / "recipe.yaml").fields.quantization == quantization
    error = refused(
        "init", "--model", "llama-8b", "--data", "plain.jsonl", "--gpu-memory", "4", "--overwrite", cwd=tmp_path
    )
    assert error["code"] == "gpu-memory"


def test_of_several_towers_the_language_is_adapted(tmp_path: Path) -> None:
    AutoConfig.for_model("llava").save_pretrained(tmp_path / "llava")
    rows(tmp_path, "plain")
    forked("init", "--model", "llava", "--data", "plain.jsonl", cwd=tmp_path)
    assert read_recipe(tmp_path / "recipe.yaml").fields.adapter.scope == ["language"]


def test_paths_are_the_recipes(base: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    rows(tmp_path, "plain")
    forked("init", "--model", base, "--data", "plain.jsonl", "--out", "recipes/one.yaml", cwd=tmp_path)
    assert read_recipe(tmp_path / "recipes" / "one.yaml").fields.data.path == "../plain.jsonl"
    assert forked("doctor", "--recipe", "recipes/one.yaml", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--data", "plain.jsonl"], "usage"),
        (["--model", "base"], "usage"),
        (["--model", "base", "--data", "missing.jsonl"], "data-missing"),
        (["--model", "base", "--data", "other.jsonl"], "data-columns"),
        (["--model", "base", "--data", "plain.jsonl", "--goal", "dpo"], "data-columns"),
        (["--model", "base", "--data", "plain.jsonl", "--out", "there.yaml"], "output-exists"),
    ],
)
def test_what_cannot_be_is_refused(base: Path, tmp_path: Path, arguments: list[str], code: str) -> None:
    rows(tmp_path, "plain")
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "there.yaml").write_text("mine\n")
    assert refused("init", *arguments, cwd=tmp_path)["code"] == code
    assert not (tmp_path / "recipe.yaml").exists()
    assert (tmp_path / "there.yaml").read_text() == "mine\n"


def test_a_terminal_is_asked(base: Path, tmp_path: Path) -> None:
    rows(tmp_path, "plain")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from graftkit.cli.main import main; main(['init'])"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    os.write(ours, f"{base}\nplain.jsonl\n".encode())
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert read_recipe(tmp_path / "recipe.yaml").fields.model == str(base)
