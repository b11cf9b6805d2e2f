"""Reinforcement learning through TRL's GRPO, with rewards that can be verified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.data.rewards import load_rewards
from graftkit.training.trainers.inputs import TrainerInputs

if TYPE_CHECKING:
    from trl import GRPOTrainer


def grpo_trainer(inputs: TrainerInputs) -> GRPOTrainer:
    """Make TRL's trainer, with the recipe's rewards.

    Raises:
        DataError: ``reward``.
    """
    from trl import GRPOTrainer

    recipe = inputs.recipe
    rewards = load_rewards(recipe.fields.data.reward, recipe.path.parent)
    return GRPOTrainer(reward_funcs=rewards, **inputs.kwargs)
