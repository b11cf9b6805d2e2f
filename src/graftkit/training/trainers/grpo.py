"""Reinforcement through TRL's GRPO, with rewards that can be verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.training.data.load import Data
from graftkit.training.model import Base

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import GRPOTrainer


def grpo_trainer(
    base: Base, data: Data, args: Any, callbacks: Sequence[TrainerCallback], rewards: Sequence[Callable[..., Any]]
) -> GRPOTrainer:
    """TRL's trainer for this base, data and rewards; it attaches the planned adapter itself."""
    from trl import GRPOTrainer

    return GRPOTrainer(
        model=base.model,
        reward_funcs=list(rewards),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=base.processor,
        peft_config=base.peft_config,
        callbacks=list(callbacks),
    )
