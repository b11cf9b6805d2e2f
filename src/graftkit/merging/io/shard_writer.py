"""Write one output file: many threads read and compute, and the results go to the disk in the file's order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graftkit.merging.arithmetic.compute import Scratch, chunks_of
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.direct_writer import DirectWriter, direct_writer, write_buffers
from graftkit.merging.io.read import Opened, opened
from graftkit.merging.io.shard_layout import ShardLayout
from graftkit.merging.plan import MergePlan

if TYPE_CHECKING:
    import torch

# Bytes that are copied at a time.
_COPY_BYTES = 4 * 2**20
# Elements of a chunk: few enough to stay in a processor's cache, enough that Python's overhead does not show.
_FEWEST, _MOST = 2**17, 2**20
# What all threads' chunks together may take, each element in double precision and some copies of it.
_CHUNK_BYTES = 96 * 2**20
_BYTES_PER_ELEMENT = 40
_MOST_WORKERS = 16


@dataclass(frozen=True)
class WorkerPools:
    """The threads of a merge, and their buffers.

    Attributes:
        writers: read, compute and write.
        verifiers: compare what was written, while ``writers`` work on the next file.
        scratch: buffers of ``writers``.
        buffers: what waits for the disk.
    """

    writers: ThreadPoolExecutor
    verifiers: ThreadPoolExecutor
    scratch: Scratch
    buffers: tuple[torch.Tensor, ...]


@contextmanager
def worker_pools() -> Iterator[WorkerPools]:
    """Start as many threads as this process may use processors; torch runs single-threaded in each."""
    import torch

    before = torch.get_num_threads()
    try:
        with _pool() as writers, _pool() as verifiers:
            yield WorkerPools(writers, verifiers, Scratch(chunk_elements()), write_buffers())
    finally:
        torch.set_num_threads(before)


def _pool() -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(workers(), initializer=torch.set_num_threads, initargs=(1,))


def workers() -> int:
    """Return how many threads a merge runs."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, available)


def chunk_elements() -> int:
    """Return how many elements a thread works on at a time: fewer where there are many threads."""
    return max(_FEWEST, min(_MOST, _CHUNK_BYTES // (_BYTES_PER_ELEMENT * workers())))


def write_shard(
    plan: MergePlan, layout: ShardLayout, path: Path, pools: WorkerPools, on_bytes: Callable[[int], None]
) -> None:
    """Write one output file, without syncing it.

    Args:
        plan: of the merge.
        layout: of this file.
        path: the file to write.
        pools: the threads to use.
        on_bytes: called with the number of bytes written since its last call, from any thread.

    Raises:
        SourceError, AdapterError, OSError: the base or an adapter cannot be read, or the file cannot be written;
            ``path`` is then incomplete.
    """
    import torch

    with opened(layout.shard.path, base_unreadable) as source, direct_writer(path, pools.buffers) as target:
        target.append(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
        on_bytes(len(layout.header))
        ordered = OrderedWriter(target)

        def write(number: int, piece: _Piece) -> None:
            data = piece.read(source, pools.scratch)
            ordered.append(number, data)
            on_bytes(data.numel())

        pieces = sorted(_pieces(plan, layout, pools.scratch.elements), key=lambda piece: piece.at)
        futures = [pools.writers.submit(write, *numbered) for numbered in enumerate(pieces)]
        wait_for_all(futures, ordered.stop)


class _Piece(NamedTuple):
    """Consecutive bytes of the output.

    Attributes:
        at: their position in the output.
        read: returns them, from the base's file, in a buffer that the thread's next piece will reuse.
    """

    at: int
    read: Callable[[Opened, Scratch], torch.Tensor]


def _pieces(plan: MergePlan, layout: ShardLayout, elements: int) -> Iterator[_Piece]:
    for job in layout.jobs:
        for chunk in chunks_of(plan, job, elements):
            yield _Piece(layout.at[job.name] + chunk.begin * job.row_bytes, chunk.merge)
    for begin, end in layout.unchanged:
        for at in range(begin, end, _COPY_BYTES):
            yield _Piece(at + layout.shift, partial(_copied, at, min(at + _COPY_BYTES, end)))


def _copied(begin: int, end: int, source: Opened, scratch: Scratch) -> torch.Tensor:
    import torch

    raw = scratch.take("raw", end - begin, torch.uint8)
    source.read_into(raw, begin)
    return raw


class OrderedWriter:
    """Appends numbered pieces in the order of their numbers, while threads compute them in any order."""

    def __init__(self, target: DirectWriter) -> None:
        self._target = target
        self._changed = threading.Condition()
        self._next, self._stopped = 0, False

    def append(self, number: int, data: torch.Tensor) -> None:
        """Wait until all pieces before ``number`` are appended, then append ``data``.

        Raises:
            StoppedError: another thread has failed, so that the wait would not end.
            OSError: as :meth:`DirectWriter.append`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next == number)
            if self._stopped:
                raise StoppedError
        self._target.append(data)
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """End the wait of every thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class StoppedError(Exception):
    """Another thread has failed; its error gives the reason."""


def wait_for_all(futures: Iterable[Future[None]], stop: Callable[[], None] = lambda: None) -> None:
    """Wait for all futures; after the first failure, or an interrupt, cancel the rest and call ``stop``."""
    every = list(futures)
    try:
        done, _ = wait(every, return_when=FIRST_EXCEPTION)
        failures = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
            raise error
    finally:
        stop()
        for future in every:
            future.cancel()
        wait(every)
