"""Training from the start, or from a checkpoint, the last one included."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import TrainingError
from graftkit.training.checkpointing.checkpoints import Sharing, Written, written
from graftkit.training.distributed.launch_checks import sharing_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

_log = logging.getLogger(__name__)


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end.

    A run that was cut after its last step only takes over what that step left: transformers 5.23 would train one
    step more than was asked for (``Trainer._run_epoch`` looks at the number of steps after each step).

    Args:
        trainer: a transformers trainer.
        checkpoint: the whole one to go on from, which fits (:func:`check_fits`); None to begin.
    """
    if checkpoint is None:
        trainer.train()
        return
    trainer.add_callback(_ends_when_done())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except _AllDone:
        trainer._finalize_training(None, 0, time.time())


def check_fits(checkpoint: Path, args: Any) -> None:
    """Check that this run can go on from what another left.

    Where each process holds everything, another number of processes is told, and goes on: of the random states
    some are then missing.

    Args:
        checkpoint: a whole one.
        args: the trainer's, made in this process.

    Raises:
        TrainingError: ``cannot-resume``: the state of the optimizer is not there, or was shared out otherwise than
            it is in this run.
    """
    was, sharing = written(checkpoint), sharing_of(args)
    if not was.trains_on:
        raise _unfit(
            "the checkpoint holds an adapter alone",
            checkpoint,
            "without the optimizer's state and its schedule the curve would not be the same",
            "leave save_only_model out; or train the adapter on in a run of its own",
        )
    if was.sharing is not sharing:
        raise _unfit(
            "the checkpoint was written in another way than this run would read it",
            checkpoint,
            f"written under {was.sharing}; this run is under {sharing}",
            "start it as the run that was cut was started",
        )
    if was.processes != args.world_size:
        _check_number(checkpoint, was, args)


def _check_number(checkpoint: Path, was: Written, args: Any) -> None:
    if was.sharing in (Sharing.ZERO_2, Sharing.ZERO_3):
        raise _unfit(
            f"{was.processes} processes wrote the checkpoint, and {args.world_size} are to go on",
            checkpoint,
            "each holds a part of the optimizer's state, and DeepSpeed does not share it out anew",
            f"start {was.processes} processes",
        )
    if args.process_index == 0:
        _log.warning(
            "%s was written by %d processes, and %d go on: the same curve needs as many, with as many rows each",
            checkpoint.name,
            was.processes,
            args.world_size,
        )


def _unfit(what: str, checkpoint: Path, why: str, help: str) -> TrainingError:
    return TrainingError(what, where=str(checkpoint), why=why, help=help, code="cannot-resume")


class _AllDone(Exception):  # noqa: N818  # no error: it leads out of the trainer's loop
    """No step is left."""


def _ends_when_done() -> TrainerCallback:
    from transformers import TrainerCallback

    class EndsWhenDone(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        """The checkpoint is loaded by now, in every way that it can be shared out."""

        def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                raise _AllDone

    return EndsWhenDone()
