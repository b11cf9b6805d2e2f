"""transformers without its advice and its progress bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings about random weights and token ids, and its bars, out of the terminal."""
    from transformers.utils.logging import set_tqdm_hook

    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    hook = set_tqdm_hook(_without_bar)
    try:
        yield
    finally:
        set_tqdm_hook(hook)
        logger.setLevel(before)


def _without_bar(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A disabled bar of tqdm still takes its lock, which a process shares with its forks: one that is killed may
    # hold it for good.
    from transformers.utils.logging import EmptyTqdm

    return EmptyTqdm(*args, **kwargs)
