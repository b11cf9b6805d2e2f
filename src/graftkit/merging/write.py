"""Writing one output file: every thread reads, computes and writes, so that the three overlap."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftkit.merging.compute import Chunk, Scratch, chunks_of
from graftkit.merging.layout import Layout
from graftkit.merging.plan import MergePlan
from graftkit.merging.tensors import open_file
from graftkit.merging.transfer import copy_range, write_from

# Elements of a chunk: few enough to stay in a processor's cache, and so many that Python's share does not show.
_FEWEST, _MOST = 2**17, 2**20
# What all threads' chunks together may take, each element in double precision and some copies of it.
_CHUNK_BYTES = 96 * 2**20
_BYTES_AN_ELEMENT = 40
_MOST_WORKERS = 16
# So much is written before the disk is asked to take it.
_FLUSH_BYTES = 128 * 2**20

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Crew:
    """The threads of a merge, and their buffers.

    Attributes:
        pool: reads, computes and writes.
        checkers: compare what is written, while ``pool`` is at the next file.
        flusher: one thread that keeps the disk busy.
        scratch: buffers of ``pool``.
    """

    pool: ThreadPoolExecutor
    checkers: ThreadPoolExecutor
    flusher: ThreadPoolExecutor
    scratch: Scratch


@contextmanager
def crew() -> Iterator[Crew]:
    """As many threads as this process may use processors; torch runs one thread in each."""
    import torch

    before = torch.get_num_threads()
    try:
        with _pool(workers()) as pool, _pool(workers()) as checkers, _pool(1) as flusher:
            yield Crew(pool, checkers, flusher, Scratch(chunk_elements()))
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


def write_shard(plan: MergePlan, layout: Layout, path: Path, crew: Crew, tick: Tick) -> None:
    """Write one output file, without its last step: making it durable.

    Args:
        plan: of the merge.
        layout: of this file.
        path: to write to.
        crew: that does it.
        tick: called with the number of bytes that have been written since its last call.

    Raises:
        OSError: reading or writing failed; what is at ``path`` is then not whole.
    """
    with open_file(layout.shard) as source, _created(path, layout.size) as target:
        os.pwrite(target, layout.header, 0)
        tick(len(layout.header))
        flush = _Flush(target, crew.flusher)

        def wrote(count: int) -> None:
            flush.wrote(count)
            tick(count)

        def copy(begin: int, end: int) -> None:
            copy_range(source, target, begin, end, layout.shift)
            wrote(end - begin)

        def merge(chunk: Chunk) -> None:
            job = chunk.terms.job
            data = chunk.merge(source, crew.scratch)
            width = job.stored.nbytes // job.rows
            write_from(target, data, layout.at[job.name] + chunk.begin * width)
            wrote(data.numel())

        chunks = (c for job in layout.jobs for c in chunks_of(plan, job, crew.scratch.elements))
        futures = [crew.pool.submit(merge, chunk) for chunk in chunks]
        futures += [crew.pool.submit(copy, *span) for span in layout.unchanged]
        try:
            finish(futures)
        finally:
            flush.wait()


class _Flush:
    """Sends what is written to the disk as it comes, so that the disk does not start when the rest is done."""

    def __init__(self, fd: int, flusher: ThreadPoolExecutor) -> None:
        self._fd, self._flusher = fd, flusher
        self._lock = threading.Lock()
        self._waiting = 0
        self._last: Future[None] | None = None

    def wrote(self, count: int) -> None:
        with self._lock:
            self._waiting += count
            if self._waiting >= _FLUSH_BYTES and (self._last is None or self._last.done()):
                self._waiting = 0
                self._last = self._flusher.submit(os.fdatasync, self._fd)

    def wait(self) -> None:
        """Wait until the file may be closed."""
        if self._last is not None:
            self._last.result()


@contextmanager
def _created(path: Path, size: int) -> Iterator[int]:
    """A new file of its final size: a disk that is too small says so here, and not at the end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        _allocate(fd, size)
        yield fd
    finally:
        os.close(fd)


def _allocate(fd: int, size: int) -> None:
    import errno

    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def finish(futures: Iterable[Future[None]]) -> None:
    """Wait for all; after the first failure, or an interrupt, start none of the rest."""
    every = list(futures)
    try:
        done, _ = wait(every, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        for future in every:
            future.cancel()
        wait(every)
