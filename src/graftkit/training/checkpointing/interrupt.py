"""Ctrl-C ends a run after the current step, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from graftkit.training.distributed.collectives import any_process


class SaveOnInterrupt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns the first interrupt into "save and stop"; the end of the launcher does the same.

    Several processes are interrupted at different moments: at the end of each step they agree whether any was.

    Attributes:
        requested: whether the user pressed Ctrl-C, or killed the launcher.
    """

    def __init__(self, repeat_window: float = 1.0) -> None:
        """
        Args:
            repeat_window: seconds in which a second interrupt counts as the first: a launcher passes on to its
                processes what the terminal has already sent them.
        """
        self.requested = False
        self._repeat_window = repeat_window
        self._parent = os.getppid()
        self._requested_at = 0.0
        self._previous: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)

    def on_step_end(self, args: Any, _state: Any, control: Any, **_: Any) -> None:
        self.requested = any_process(self.requested or launcher_is_gone(self._parent), args.device)
        if self.requested:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the previous handler of the signal; safe to repeat."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
        elif now - self._requested_at > self._repeat_window:
            previous = self._previous
            self.restore()
            previous(number, frame)


def launcher_is_gone(parent: int) -> bool:
    """Check whether the launcher was killed without ending this process, which would train on unseen.

    torchrun, with which accelerate starts processes, gives each a session to itself
    (``torch.distributed.elastic.multiprocessing.subprocess_handler``): what kills the launcher's process group
    does not reach them, and a run that resumes theirs would share its folder with them.

    Args:
        parent: the parent of this process when it began.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent
