"""SFT with pictures on a twin of Gemma 4 E2B: scikit-learn's handwritten digits, read by both towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training.gemma import MODEL, known_to_transformers
from tests.training.proof import reloaded, run
from tests.training.small import QUICK

import graftkit as gk
from graftkit.demo.digits import load_digit_split
from graftkit.demo.processor import config_overrides, digit_processor
from graftkit.demo.run import proof_batch
from graftkit.demo.training import accuracy

# As long as the demo.
LONG = {"max_steps": 200, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 10}
SHORT = {**LONG, "max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 5e-3}


@pytest.mark.parametrize(
    ("args", "least"),
    [pytest.param(SHORT, 0.5, id="short"), pytest.param(LONG, 0.85, id="as the demo", marks=pytest.mark.slow)],
)
def test_digits_are_read(tmp_path: Path, args: dict[str, Any], least: float) -> None:
    processor, digits = digit_processor(), load_digit_split()
    gk.twin(MODEL, overrides=config_overrides()).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    digits.train.save_to_disk(tmp_path / "train")
    recipe = tmp_path / "digits.yaml"
    # A cut prompt would lose picture tokens.
    own = {
        **QUICK,
        "use_cpu": True,
        "save_strategy": "no",
        "max_length": None,
        "output_dir": str(tmp_path / "out"),
    }
    adapter = {"scope": ["language", "vision"], "r": 16, "alpha": 32}
    told = {
        "model": str(tmp_path / "base"),
        "adapter": adapter,
        "data": {"path": "train"},
        "args": {**own, **args},
    }
    recipe.write_text(json.dumps(told))
    with known_to_transformers(processor):
        result, model = run(recipe)
    loss = result.curve("loss")
    assert loss[-1][1] < 0.6 * loss[0][1]
    assert accuracy(model, processor, digits.held_out) > least
    assert reloaded(model, tmp_path / "base", result.folder, proof_batch(processor, digits)).faithful
