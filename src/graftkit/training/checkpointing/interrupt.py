"""Ctrl-C ends a run after the step it is in, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from graftkit.training.distributed.launch_checks import any_asked, launcher_is_gone

# A launcher sends its processes what the terminal has sent them already: so soon after, it is the same wish.
_SAME_WISH_S = 1.0


class SaveOnInterrupt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns the first interrupt into "save and stop".

    Several processes hear of it at different moments: at the end of each step they agree whether any of them has.
    A launcher that was killed asks for the same.

    Attributes:
        asked: whether the user pressed Ctrl-C, or killed the launcher.
    """

    def __init__(self) -> None:
        self.asked = False
        self._parent = os.getppid()
        self._heard_at = 0.0
        self._before: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, _state: Any, control: Any, **_: Any) -> None:
        self.asked = any_asked(self.asked or launcher_is_gone(self._parent), args)
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signal back to whoever had it before; safe to repeat."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._heard_at = True, now
        elif now - self._heard_at > _SAME_WISH_S:
            before = self._before
            self.restore()
            before(number, frame)
