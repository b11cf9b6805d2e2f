"""A callback that times the steps of a run and nothing else; it knows no library that is compared."""

from __future__ import annotations

import json
import time

import torch
from transformers import TrainerCallback

# Steps before the clock starts: the first ones fill the allocator, unless something ran before them.
WARM = 5


class Clock(TrainerCallback):
    """Times a run from the beginning of its sixth step to the end of its last one, logging between them included.

    On the CPU it counts this process's CPU seconds, which other load on the machine does not lengthen; on a GPU
    seconds, with its memory's peak in the same stretch. Of a shorter run it times the last step.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._seconds = 0.0
        self._steps = 0
        self._warm = 0

    def on_step_begin(self, _args: object, state: object, *_: object, **__: object) -> None:
        if self._begun is None and state.global_step == min(WARM, state.max_steps - 1):
            self._warm = state.global_step
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._begun = _now()

    def on_step_end(self, _args: object, state: object, *_: object, **__: object) -> None:
        if state.global_step == state.max_steps:
            assert self._begun is not None
            self._seconds, self._steps = _now() - self._begun, state.global_step - self._warm

    def tell(self) -> None:
        """Print the figures as JSON on one line."""
        figures = {"steps_per_second": self._steps / self._seconds}
        if torch.cuda.is_available():
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(f"\n{json.dumps(figures)}", flush=True)


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
