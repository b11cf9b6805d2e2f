"""Training from the start or from a checkpoint, that of the last step included."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from graftkit.errors import TrainingError
from graftkit.training.checkpointing.checkpoints import CheckpointInfo, read_info
from graftkit.training.distributed.sharding import Sharding, sharding_of

_log = logging.getLogger(__name__)


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end.

    A run that was cut short after its last step is only loaded: transformers 5.23 would train one step too many
    (``Trainer._run_epoch`` looks at the number of steps after each step).

    Args:
        trainer: a transformers trainer.
        checkpoint: a complete one that passes :func:`check_resumable`; None to begin.
    """
    if checkpoint is None:
        trainer.train()
        return
    trainer.add_callback(_StopWhenDone())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except _AllStepsDone:
        trainer._finalize_training(None, 0, time.time())


def check_resumable(checkpoint: Path, args: Any) -> None:
    """Check that this run can resume a checkpoint.

    Where nothing is sharded, a different number of processes only gets a warning: random states are then missing.

    Args:
        checkpoint: a complete one.
        args: the trainer's, made in this process.

    Raises:
        TrainingError: ``cannot-resume``: the optimizer's state is not there, or is sharded differently in this
            run.
    """
    info, sharding = read_info(checkpoint), sharding_of(args)
    if not info.resumable:
        raise _cannot_resume(
            "the checkpoint has only an adapter",
            checkpoint,
            "without the optimizer's state and schedule the loss curve would differ",
            "leave save_only_model out; or train the adapter further as a new run",
        )
    if info.sharding is not sharding:
        raise _cannot_resume(
            "the checkpoint is sharded differently from this run",
            checkpoint,
            f"written under {info.sharding}; this run is under {sharding}",
            "start this run as the first one was started",
        )
    if info.processes != args.world_size:
        _check_processes(checkpoint, info, args)


def _check_processes(checkpoint: Path, info: CheckpointInfo, args: Any) -> None:
    if info.sharding in (Sharding.ZERO_2, Sharding.ZERO_3):
        raise _cannot_resume(
            f"the checkpoint was written by {info.processes} processes, and this run has {args.world_size}",
            checkpoint,
            "each process holds a shard of the optimizer's state, and DeepSpeed does not reshard it",
            f"start {info.processes} processes",
        )
    if args.process_index == 0:
        _log.warning(
            "%s was written by %d processes, and this run has %d: for the same loss curve, use as many processes "
            "with as many rows each",
            checkpoint.name,
            info.processes,
            args.world_size,
        )


def _cannot_resume(what: str, checkpoint: Path, why: str, help: str) -> TrainingError:
    return TrainingError(what, where=str(checkpoint), why=why, help=help, code="cannot-resume")


class _AllStepsDone(Exception):  # noqa: N818  # not an error: it ends the trainer's loop
    """No step is left."""


class _StopWhenDone(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stops once the checkpoint is loaded, however it is sharded."""

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _AllStepsDone
