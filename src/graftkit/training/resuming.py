"""Training from the start, or from a checkpoint, the last one included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import TrainingError

if TYPE_CHECKING:
    from transformers import TrainerState


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end.

    A run that was cut after its last step only takes over what that step left: transformers 5.23 would train one
    step more than was asked for (``Trainer._run_epoch`` looks at the number of steps after each step).

    Args:
        trainer: a transformers trainer.
        checkpoint: the whole one to go on from; None to begin.

    Raises:
        TrainingError: ``nothing-to-resume``: all steps are done, and what they left is in parts.
    """
    if checkpoint is None:
        trainer.train()
        return
    state = _state(checkpoint)
    if not 0 < trainer.args.max_steps <= state.global_step:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TrainingError(
            f"all {trainer.args.max_steps} steps are done",
            where=str(checkpoint),
            help="raise args.max_steps to train on; this checkpoint holds the result",
            code="nothing-to-resume",
        )
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state


def _state(checkpoint: Path) -> TrainerState:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
