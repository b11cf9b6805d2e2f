"""Settings of a process that does one thing and ends."""

from __future__ import annotations

import gc
import os


def skip_needless_work() -> None:
    """Let imports load no compiler, and collect garbage seldom.

    Not for a program of others: it may compile models, and make more garbage than one call of graftkit does.
    """
    # Importing bitsandbytes would load torch's compiler with all of inductor. Nothing that graftkit runs is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Modules are never freed: collecting garbage after every 700 of their objects finds none.
    gc.set_threshold(100_000, 20, 50)
