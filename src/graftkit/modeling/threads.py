"""The threads that torch computes with on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one thread; restore their number after it.

    Sums of several threads are rounded in another order, so their last digits depend on the machine. Models as
    small as twins gain nothing from a second thread, and on a busy machine the threads wait for each other: twenty
    times as long, measured with matrices of width 64 on two cores.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
