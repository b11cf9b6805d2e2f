"""GRPO with a reward that can be verified: sums of two digits."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from tests.training.proof import loads_in_stock_peft
from tests.training.small import save_model, word_tokenizer, write_recipe

from graftkit.adapters.record import read_record
from graftkit.recipes.recipe import read_recipe
from graftkit.training.run import train

SUMS = [(a, b) for a in range(10) for b in range(10)]
# A few steps of supervised training, so that some of the sampled answers are right.
WARM = {"max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 50, "save_strategy": "no"}
ARGS = {
    "max_steps": 100,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 2,
    "beta": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base that has seen sums: the merged result of a short supervised run."""
    folder = tmp_path_factory.mktemp("sums")
    tokenizer = word_tokenizer([*map(str, range(19)), "+", "="])
    base = save_model(folder / "base", tokenizer)
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in SUMS]
    result = train(read_recipe(write_recipe(folder / "sft.yaml", base, rows, args=WARM)))
    assert loads_in_stock_peft(base, result.folder, merged=folder / "merged").faithful
    tokenizer.save_pretrained(folder / "merged")
    return folder / "merged"


def test_the_reward_rises(tmp_path: Path, started: Path) -> None:
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in SUMS]
    file = write_recipe(
        tmp_path / "grpo.yaml", started, rows, trainer="grpo", data={"reward": "number_match"}, args=ARGS
    )
    result = train(read_recipe(file))
    rewards, distances = ([value for _, value in result.curve(name)] for name in ("reward", "kl"))
    assert fmean(rewards[-20:]) > fmean(rewards[:20]) + 0.15
    # The reference is the base under the adapter, which adds nothing at first and more and more later.
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert fmean(distances[-20:]) > 0.05
    stock = loads_in_stock_peft(started, result.folder)
    assert stock.adapters == ["default"]
    assert stock.faithful
    assert stock.effect > 0.01
    record = read_record(result.folder)
    assert record is not None
    assert record.expected is not None
    assert record.expected.prompts[0].base != record.expected.prompts[0].adapter
