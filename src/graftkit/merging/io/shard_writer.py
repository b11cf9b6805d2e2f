"""Writing one output file: every thread reads, computes and writes, so that the three overlap."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.merging.arithmetic.compute import Chunk, Scratch, chunks_of, row_bytes
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.direct_writer import Room, rooms, stream
from graftkit.merging.io.read import Opened, opened
from graftkit.merging.io.shard_layout import ShardLayout
from graftkit.merging.plan import MergePlan

if TYPE_CHECKING:
    import torch

# Bytes that are copied at a time.
_COPY_BYTES = 4 * 2**20
# Elements of a chunk: few enough to stay in a processor's cache, and so many that Python's share does not show.
_FEWEST, _MOST = 2**17, 2**20
# What all threads' chunks together may take, each element in double precision and some copies of it.
_CHUNK_BYTES = 96 * 2**20
_BYTES_AN_ELEMENT = 40
_MOST_WORKERS = 16

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Crew:
    """The threads of a merge, and their buffers.

    Attributes:
        pool: reads, computes and writes.
        checkers: compare what is written, while ``pool`` is at the next file.
        scratch: buffers of ``pool``.
        rooms: where bytes wait for the disk.
    """

    pool: ThreadPoolExecutor
    checkers: ThreadPoolExecutor
    scratch: Scratch
    rooms: tuple[Room, ...]


@contextmanager
def crew() -> Iterator[Crew]:
    """As many threads as this process may use processors; torch runs one thread in each."""
    import torch

    before = torch.get_num_threads()
    try:
        with _pool(workers()) as pool, _pool(workers()) as checkers:
            yield Crew(pool, checkers, Scratch(chunk_elements()), rooms())
    finally:
        torch.set_num_threads(before)


def _pool(count: int) -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def workers() -> int:
    """How many threads a merge runs."""
    return min(
        _MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def chunk_elements() -> int:
    """How many elements a thread works on at a time: fewer where there are many threads."""
    return max(_FEWEST, min(_MOST, _CHUNK_BYTES // (_BYTES_AN_ELEMENT * workers())))


def write_shard(plan: MergePlan, layout: ShardLayout, path: Path, crew: Crew, tick: Tick) -> None:
    """Write one output file, without its last step: making it durable.

    Args:
        plan: of the merge.
        layout: of this file.
        path: to write to.
        crew: that does it.
        tick: called with the number of bytes that have been written since its last call.

    Raises:
        SourceError, AdapterError, OSError: the base or an adapter cannot be read, or the file cannot be written;
            what is at ``path`` is then not whole.
    """
    import torch

    with opened(layout.shard.path, base_unreadable) as source, stream(path, crew.rooms) as target:
        target.append(torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
        tick(len(layout.header))
        turns = Turns()

        def write(number: int, piece: _Piece) -> None:
            data = piece.read(source, crew.scratch)
            with turns.take(number):
                target.append(data)
            tick(data.numel())

        pieces = sorted(_pieces(plan, layout, crew.scratch.elements), key=lambda piece: piece.at)
        futures = [crew.pool.submit(turns.stopping(write), *numbered) for numbered in enumerate(pieces)]
        finish(futures, turns.stop)


@dataclass(frozen=True)
class _Piece:
    """Consecutive bytes of the output.

    Attributes:
        at: where they begin in the output.
        source: the merged rows that they are, or the range of the base's file.
    """

    at: int
    source: Chunk | tuple[int, int]

    def read(self, base: Opened, scratch: Scratch) -> torch.Tensor:
        """The bytes, in a buffer that the thread's next piece will reuse."""
        import torch

        if isinstance(self.source, Chunk):
            return self.source.merge(base, scratch)
        begin, end = self.source
        raw = scratch.take("raw", end - begin, torch.uint8)
        base.read_into(raw, begin)
        return raw


def _pieces(plan: MergePlan, layout: ShardLayout, elements: int) -> Iterator[_Piece]:
    for job in layout.jobs:
        for chunk in chunks_of(plan, job, elements):
            yield _Piece(layout.at[job.name] + chunk.begin * row_bytes(job), chunk)
    for begin, end in layout.unchanged:
        for at in range(begin, end, _COPY_BYTES):
            yield _Piece(at + layout.shift, (at, min(at + _COPY_BYTES, end)))


class Turns:
    """Lets threads write in the file's order, while they read and compute in any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._stopped = 0, False

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait for the turn of that number; the next one begins after the block.

        Raises:
            StoppedError: another thread has failed, so that the turn will not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next == number)
            if self._stopped:
                raise StoppedError
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def stopping(self, work: Callable[..., None]) -> Callable[..., None]:
        """The same work, which stops all others where it fails."""

        def run(*given: Any) -> None:
            try:
                work(*given)
            except BaseException:
                self.stop()
                raise

        return run


class StoppedError(Exception):
    """Another thread has failed, and tells why."""


def finish(futures: Iterable[Future[None]], stop: Callable[[], None] = lambda: None) -> None:
    """Wait for all; after the first failure, or an interrupt, start none of the rest, and call ``stop``."""
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
