"""Preference training through TRL: the reference is the base with the adapter switched off, not a second model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.training.data.load import Data
from graftkit.training.model import Base

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import DPOTrainer


def dpo_trainer(base: Base, data: Data, args: Any, callbacks: Sequence[TrainerCallback]) -> DPOTrainer:
    """TRL's trainer for this base and data; it attaches the planned adapter itself."""
    from trl import DPOTrainer

    return DPOTrainer(
        model=base.model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=base.processor,
        peft_config=base.peft_config,
        callbacks=list(callbacks),
    )
