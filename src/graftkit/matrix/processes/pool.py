"""The processes of a run: tasks handed to workers, and what becomes of the cells of one that died."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from graftkit.matrix.cell import Cell, Check, Verdict
from graftkit.matrix.processes.worker import Finished, Prepared, Proved, Task, work
from graftkit.matrix.trials.origin import made_from, versions
from graftkit.text import printable

# Seconds within which a new process has imported what it needs.
START = 10.0
# Memory that libraries keep is freed with the process: after this many families it is replaced.
FAMILIES_A_PROCESS = 60


@dataclass
class _Worker:
    """One process, and the task it is at.

    Attributes:
        prepared: what is known of the family once its twin was tried; None before.
        proved: how many of the task's methods came back.
        families: how many tasks it was given.
        alive_at: when it last showed a sign of life.
    """

    process: Any
    pipe: Connection
    log: Path
    task: Task | None = None
    prepared: Prepared | None = None
    proved: int = 0
    families: int = 0
    alive_at: float = field(default_factory=time.monotonic)


class _Loss(Enum):
    """Why a process gave no result, and what that makes of its cells: what took too long may hold or not."""

    DIED = ("process-died", Verdict.FAILED)
    OVERDUE = ("time-limit", Verdict.UNKNOWN)

    def __init__(self, code: str, verdict: Verdict) -> None:
        self.code = code
        self.verdict = verdict


class WorkerPool:
    """The processes of a run. All of them are gone when the block ends, however it ends."""

    def __init__(self, tasks: Iterable[Task], jobs: int, time_limit: float) -> None:
        self._tasks = deque(tasks)
        self._jobs = jobs
        self._time_limit = time_limit
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._folder = tempfile.TemporaryDirectory(prefix="graftkit-")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in tuple(self._workers):
            self._end(worker)
        self._folder.cleanup()

    def results(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        """Yield what was tried last and the cells that came of it, until no task is left."""
        while self._tasks or any(worker.task for worker in self._workers):
            self._give()
            yield from self._received()
            yield from self._overdue()

    def _give(self) -> None:
        """Give every process without a task the next one, and start processes as long as some are missing."""
        while self._tasks and len([worker for worker in self._workers if worker.task]) < self._jobs:
            worker = next((worker for worker in self._workers if worker.task is None), None) or self._start()
            worker.task, worker.prepared, worker.proved = self._tasks.popleft(), None, 0
            worker.families += 1
            worker.alive_at = time.monotonic()
            with suppress(OSError):  # of a process that died meanwhile, which reading from it shows
                worker.pipe.send(worker.task)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        log = Path(self._folder.name) / f"{time.monotonic_ns()}.log"
        process = self._context.Process(target=work, args=(theirs, log), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, log)
        self._workers.append(worker)
        return worker

    def _received(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        oldest = min(worker.alive_at for worker in self._workers)
        left = max(0.0, oldest + self._time_limit - time.monotonic())
        ready = wait([worker.pipe for worker in self._workers], timeout=min(left, 1.0))
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                yield from self._lost(worker, _Loss.DIED, f"the process died: {_how(worker)}")
                continue
            worker.alive_at = time.monotonic()
            yield from self._handle(worker, message)

    def _handle(self, worker: _Worker, message: object) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        if isinstance(message, Prepared):
            worker.prepared = message
        elif isinstance(message, Proved) and worker.task is not None:
            method, _ = worker.task.methods[worker.proved]
            worker.proved += 1
            yield f"{worker.task.model_type} {method}", message.cells
        elif isinstance(message, Finished):
            worker.task = None
            if worker.families >= FAMILIES_A_PROCESS:
                self._end(worker)

    def _overdue(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        now = time.monotonic()
        for worker in tuple(self._workers):
            if worker.task is not None and now - worker.alive_at > self._time_limit:
                said = f"it took longer than the limit of {self._time_limit:g} seconds"
                yield from self._lost(worker, _Loss.OVERDUE, said)

    def _lost(self, worker: _Worker, loss: _Loss, said: str) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        """End a process, yield the cells that it was at, and put what it had not begun back."""
        self._end(worker)
        task = worker.task
        if task is None:
            return
        left = task.methods[worker.proved :]
        if worker.prepared is not None and left[1:]:
            self._tasks.appendleft(replace(task, methods=left[1:]))
        for method, checks in left[:1] if worker.prepared is not None else left:
            yield f"{task.model_type} {method}", _lost_cells(worker, task, method, checks, loss, said)

    def _end(self, worker: _Worker) -> None:
        """End a process: on its own if it waits for a task, else at once."""
        if worker.task is None:
            with suppress(OSError):
                worker.pipe.send(None)
            worker.process.join(START)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


def _how(worker: _Worker) -> str:
    worker.process.join(timeout=10)
    status = worker.process.exitcode
    return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _lost_cells(
    worker: _Worker, task: Task, method: str, checks: Iterable[Check], loss: _Loss, said: str
) -> tuple[Cell, ...]:
    prepared = worker.prepared or Prepared(None, ())
    where = f"in {method}" if worker.prepared is not None else "while the twin was built"
    evidence: Mapping[str, Any] = {"printed": _last_words(worker.log)}
    seconds = round(time.monotonic() - worker.alive_at, 3)
    return tuple(
        Cell(
            task.model_type,
            prepared.model_class,
            prepared.modalities,
            method,
            check,
            loss.verdict,
            f"{said}, {where}",
            (loss.code,),
            evidence,
            seconds,
            versions(),
            made_from(task.model_type),
            task.seed,
        )
        for check in checks
    )


def _last_words(log: Path) -> str:
    if not log.exists():
        return ""
    return printable(log.read_text(encoding="utf-8", errors="replace")[-400:])
