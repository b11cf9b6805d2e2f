"""Preference training through TRL: the reference is the base with the adapter switched off, not a second model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.training.trainers.inputs import TrainerInputs

if TYPE_CHECKING:
    from trl import DPOTrainer


def dpo_trainer(inputs: TrainerInputs) -> DPOTrainer:
    """Make TRL's trainer."""
    from trl import DPOTrainer

    return DPOTrainer(**inputs.kwargs)
