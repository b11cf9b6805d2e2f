"""Train the demo's adapters as ``graft train`` does: from a recipe, guarded, and read back."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.training.result import TrainingResult
from graftkit.training.run import train

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback

ADAPTER = {"r": 16, "alpha": 32}

# TRL's arguments.
ARGUMENTS: dict[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "logging_steps": 10,
    "max_length": None,  # a cut prompt would lose picture tokens
    "save_strategy": "no",
    "seed": 3,
    # On matrices this small float32 is as fast as bfloat16, and no memory needs to be saved.
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
}


def write_recipe(
    file: Path, *, base: Path, data: Path, output: Path, scope: Sequence[str], **arguments: Any
) -> Recipe:
    """Write and read a recipe that adapts the towers in ``scope``; ``arguments`` replace those of the demo."""
    fields = {
        "model": str(base),
        "adapter": {**ADAPTER, "scope": list(scope)},
        "data": {"path": str(data)},
        "args": {**ARGUMENTS, "output_dir": str(output), **arguments},
    }
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    return read_recipe(file)


def train_adapter(recipe: Recipe, *callbacks: TrainerCallback) -> tuple[TrainingResult, PeftModel]:
    """Train from a recipe; return the result and the trained model, in eval mode.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C, which ends the run after the step it is in.
    """
    from graftkit.demo.keep_model import KeepModel

    kept = KeepModel()
    # transformers prints every entry of its log, beside its progress bar on stderr.
    with redirect_stdout(io.StringIO()):
        result = train(recipe, callbacks=[kept, *callbacks])
    if result.interrupted:
        raise KeyboardInterrupt
    # TRL replaces the base's forward by a closure over this very model, which copies of it would run, too.
    vars(kept.model.get_base_model()).pop("forward", None)
    return result, kept.model.eval()
