"""Small text models, each with its tokenizer, data that needs no network, and the command in a process."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import graftkit as gk

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
# fp32 and no recomputation: what a net of this size needs, and the same numbers on every run.
QUICK = {
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "seed": 0,
}


def save_model(folder: Path, tokenizer: Any, model: str = "qwen3", **overrides: Any) -> Path:
    """Save a twin and the tokenizer that it fits into the folder."""
    size = -(-len(tokenizer) // 64) * 64
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    gk.twin(model, overrides={"vocab_size": size, **ids, **overrides}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_tokenizer(texts: Sequence[str], size: int = 512) -> Any:
    """Train a byte-pair tokenizer on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL.values()], initial_alphabet=letters, show_progress=False
        ),
    )
    return _as_transformers(backend)


def word_tokenizer(words: Sequence[str]) -> Any:
    """Return a tokenizer that knows these words, separated by spaces, and no other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {word: at for at, word in enumerate((*SPECIAL.values(), *words))}
    backend = Tokenizer(models.WordLevel(known, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _as_transformers(backend)


def _as_transformers(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=256, **SPECIAL)


def docstrings(count: int) -> list[tuple[str, str]]:
    """Return (signature, summary line) of so many functions of the standard library, always the same ones."""
    rows = _all_docstrings()
    assert len(rows) >= count
    return list(rows[:count])


@cache
def _all_docstrings() -> tuple[tuple[str, str], ...]:
    found = dict(_documented(Path(sysconfig.get_paths()["stdlib"])))
    rows = sorted(found.items())
    random.Random(0).shuffle(rows)
    return tuple(rows)


def _documented(library: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            if 20 <= len(summary) <= 60 and summary.isascii():
                yield f"def {node.name}({', '.join(a.arg for a in node.args.args)}):", summary


def preferences(count: int) -> list[dict[str, str]]:
    """Return signatures with their own summary, preferred to that of another function."""
    rows = docstrings(count)
    others = [rows[at - 1][1] for at in range(len(rows))]
    return [
        {"prompt": signature, "chosen": f" {right}", "rejected": f" {wrong}"}
        for (signature, right), wrong in zip(rows, others, strict=True)
    ]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows as JSON lines."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def write_recipe(file: Path, model: Path, rows: Sequence[Mapping[str, Any]], **fields: Any) -> Path:
    """Write a recipe, as JSON, which is YAML, and its rows beside it."""
    data = write_rows(file.with_suffix(".jsonl"), rows)
    adapter = {"targets": "all-linear", "r": 8, "alpha": 16, **fields.pop("adapter", {})}
    args = {**QUICK, "output_dir": str(file.with_suffix("")), **fields.pop("args", {})}
    section = {"path": data.name, **fields.pop("data", {})}
    recipe = {"model": str(model), "adapter": adapter, "data": section, "args": args, **fields}
    file.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    return file


def graft(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in another process."""
    return subprocess.run(
        [sys.executable, "-m", "graftkit.cli.main", *command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=500,
        check=False,
    )


def started(*command: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command in another process, and capture its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "graftkit.cli.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ},
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Return as soon as the path exists, while the process is running."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
