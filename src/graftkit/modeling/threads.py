"""The threads that torch computes with on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one thread; restore their number after it.

    Sums of several threads are rounded in another order, so their last digits depend on the machine. Models as
    small as twins are no slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
