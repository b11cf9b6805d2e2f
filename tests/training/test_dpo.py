"""DPO on docstrings of the standard library: the right summary is preferred to another function's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.proof import loads_in_stock_peft
from tests.training.small import preferences, save_model, trained_tokenizer, write_recipe

import graftkit as gk
from graftkit.data.load import load_data
from graftkit.recipes.trainer_arguments import trainer_arguments
from graftkit.training.model import load_base
from graftkit.training.trainers.dpo import dpo_trainer
from graftkit.training.trainers.inputs import TrainerInputs

PAIRS = 128
ARGS = {
    "max_steps": 24,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "logging_steps": 4,
    "save_steps": 12,
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return preferences(PAIRS)


@pytest.fixture(scope="module")
def base(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text for row in rows for text in row.values()]
    return save_model(tmp_path_factory.mktemp("base"), trained_tokenizer(texts))


def recipe(folder: Path, base: Path, rows: list[dict[str, str]], **args: Any) -> Path:
    return write_recipe(folder / "dpo.yaml", base, rows, trainer="dpo", args={**ARGS, **args})


def test_the_right_summary_is_preferred_after_training(
    tmp_path: Path, base: Path, rows: list[dict[str, str]]
) -> None:
    result = gk.train(recipe(tmp_path, base, rows))
    losses, margins, accuracies = (
        [value for _, value in result.curve(name)] for name in ("loss", "rewards/margins", "rewards/accuracies")
    )
    assert losses[-1] < 0.9 * losses[0]
    assert margins[-1] > margins[0] + 0.1
    assert accuracies[-1] > accuracies[0] + 0.2
    assert accuracies[-1] > 0.8
    stock = loads_in_stock_peft(base, result.folder)
    assert stock.adapters == ["default"]
    assert stock.faithful
    assert stock.effect > 0.01
    assert len(stock.tensors) == 2 * len(result.plan.attached)


def test_the_reference_is_the_base_with_the_adapter_off(
    tmp_path: Path, base: Path, rows: list[dict[str, str]]
) -> None:
    read = gk.read_recipe(recipe(tmp_path, base, rows, logging_steps=1, max_steps=2))
    data = load_data(read)
    trainer = dpo_trainer(TrainerInputs(read, load_base(read, data.modalities), data, trainer_arguments(read)))
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    first, second = ([entry[f"rewards/{kind}"] for kind in ("chosen", "rejected")] for entry in steps(trainer))
    # A new adapter adds nothing, so that policy and reference agree; after one step they do not.
    assert first == pytest.approx([0, 0], abs=1e-6)
    assert second != pytest.approx([0, 0], abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert [file.name for file in (tmp_path / "saved").rglob("*.safetensors")] == ["adapter_model.safetensors"]


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
