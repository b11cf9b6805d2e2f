"""Settings of a process that does one thing and ends."""

from __future__ import annotations

import gc
import os


def load_no_compiler() -> None:
    """Let imports load no compiler; nothing that this process calls is compiled from then on.

    Importing bitsandbytes would load torch's compiler with all of inductor.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def collect_garbage_seldom() -> None:
    """Collect garbage after every 100,000 objects: imported modules are most of them, and are never freed."""
    gc.set_threshold(100_000, 20, 50)
