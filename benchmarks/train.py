"""``graft train`` against a hand-written TRL script that does the same, in steps a second, as a ratio in one run.

Run: python benchmarks/train.py [--rounds 4] [--steps 60] [--hidden 384] [--layers 6]
Both train the same LoRA on the same small language model with the same data and arguments, alternating, and each
goes first in half of the rounds. The clock runs from the first step's beginning to the last one's end, saving
included; imports, loading and the checks before the first step are shown separately. It counts CPU seconds of this
process, which other load on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from transformers.utils import logging

WORDS = 400
ROWS = 512


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Records when the first step begins and when the last one has ended."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.ended = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self.begun or time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.process_time()


def main() -> None:
    """Print one line for each way, and their ratio."""
    options = _options()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    ways: dict[str, Callable[[Path, Mapping[str, Any], Clock], None]] = {"TRL": _by_hand, "graft": _by_recipe}
    with tempfile.TemporaryDirectory(prefix="graft-train-") as name:
        folder = Path(name)
        size = _write_base(folder / "base", options.hidden, options.layers)
        _write_rows(folder / "rows.jsonl")
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        with redirect_stdout(io.StringIO()):
            for at in range(options.rounds):
                for way in sorted(ways, reverse=bool(at % 2)):
                    runs[way].append(_timed(ways[way], folder, options.steps))
    print(f"{size / 1e6:.1f} M parameters, {options.steps} steps of 8 rows, {options.rounds} rounds in turn")
    _show(runs, options.steps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


def _timed(
    train: Callable[[Path, Mapping[str, Any], Clock], None], folder: Path, steps: int
) -> tuple[float, float]:
    """Return the seconds of the steps, and of everything else."""
    clock, out = Clock(), folder / "out"
    started = time.process_time()
    train(folder, {**_arguments(steps), "output_dir": str(out)}, clock)
    whole = time.process_time() - started
    shutil.rmtree(out)
    assert clock.begun is not None
    stepping = clock.ended - clock.begun
    return stepping, whole - stepping


def _arguments(steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_steps": 30,
        "bf16": False,
        "activation_checkpointing": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "log_level": "error",
        "seed": 0,
    }


def _by_hand(folder: Path, arguments: Mapping[str, Any], clock: Clock) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=SFTConfig(**arguments),
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model()


def _by_recipe(folder: Path, arguments: Mapping[str, Any], clock: Clock) -> None:
    from graftkit.recipes.recipe import read_recipe
    from graftkit.training.run import train

    recipe = {
        "model": str(folder / "base"),
        "adapter": {"targets": "all-linear", "r": 16, "alpha": 32},
        "data": {"path": "rows.jsonl"},
        "args": dict(arguments),
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    train(read_recipe(file), callbacks=[clock])


def _show(runs: Mapping[str, list[tuple[float, float]]], steps: int) -> None:
    print(f"{'':8} {'steps/s':>8} {'rest':>7}   steps/s of every round")
    for way, measured in runs.items():
        rates = [steps / stepping for stepping, _ in measured]
        rest = statistics.median(seconds for _, seconds in measured)
        every = " ".join(f"{rate:.2f}" for rate in rates)
        print(f"{way:8} {statistics.median(rates):8.2f} {rest:6.1f}s   {every}")
    # The two runs of a round follow each other: their ratio varies least on a busy machine.
    pairs = zip(runs["TRL"], runs["graft"], strict=True)
    ratios = [theirs / ours for (theirs, _), (ours, _) in pairs]
    print(f"graft / TRL, median of the rounds: {statistics.median(ratios):.3f} (aim: 0.98)")


def _write_base(folder: Path, hidden: int, layers: int) -> int:
    """Save a random Llama-like model with a tokenizer; return its number of parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    known = {word: at for at, word in enumerate((*special.values(), *(f"w{n}" for n in range(WORDS))))}
    backend = Tokenizer(models.WordLevel(known, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=256, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_rows(file: Path) -> None:
    draw = random.Random(0)
    rows = ({"text": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(64))} for _ in range(ROWS))
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
