"""SFT with pictures on a twin of Gemma 4 E2B: scikit-learn's handwritten digits, read by both towers.

The demo trains the same way for longer; see tests/e2e/test_demo.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.training.gemma import MODEL
from tests.training.proof import reloaded

import graftkit as gk
from graftkit.demo.digits import load_digit_split
from graftkit.demo.evaluation import accuracy, model_inputs
from graftkit.demo.processor import config_overrides, digit_processor, known_to_transformers
from graftkit.demo.training import train_adapter, write_recipe

SHORT = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 5e-3}


def test_digits_are_read(tmp_path: Path) -> None:
    processor, digits = digit_processor(), load_digit_split()
    base, output = tmp_path / "base", tmp_path / "out"
    gk.twin(MODEL, overrides=config_overrides()).save_pretrained(base)
    processor.save_pretrained(base)
    digits.train.save_to_disk(tmp_path / "train")
    file, scope = tmp_path / "digits.yaml", ("language", "vision")
    recipe = write_recipe(file, base=base, data=Path("train"), output=output, scope=scope, **SHORT)
    with known_to_transformers(processor):
        result, model = train_adapter(recipe)
    loss = result.curve("loss")
    assert loss[-1][1] < 0.6 * loss[0][1]
    assert accuracy(model, processor, digits.held_out) > 0.5
    assert reloaded(model, base, result.folder, model_inputs(processor, digits.held_out[:16])).faithful
