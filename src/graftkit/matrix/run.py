"""A run: which cells are still to be made, how long that will take, and the processes that make them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean
from typing import Any

from graftkit.matrix.cell import Cell, Check, Verdict
from graftkit.matrix.store import Store
from graftkit.matrix.trials.origin import made_from, versions
from graftkit.matrix.worker import Finished, Prepared, Proved, Task, work
from graftkit.progress import Progress
from graftkit.text import printable

# Seconds without a sign of life after which a family's process is ended: a twin, or one method's checks.
TIME_LIMIT = 300.0
# Memory that libraries keep is freed with the process: after this many families it is replaced.
_FAMILIES_A_PROCESS = 60
# Where no earlier run tells: seconds for the twin of a family, for a method, and to start a process.
_TWIN, _METHOD, _START = 1.0, 1.0, 10.0


class Trust(StrEnum):
    """Which cells of a store are not tried again.

    Attributes:
        CURRENT: those that the same versions, code and seed made.
        ALL: every one.
        NONE: none.
    """

    CURRENT = "current"
    ALL = "all"
    NONE = "none"


def remaining(
    store: Store,
    families: Iterable[str],
    methods: Iterable[str],
    checks: Iterable[Check],
    *,
    seed: int = 0,
    trust: Trust = Trust.CURRENT,
) -> tuple[Task, ...]:
    """Return what is to be tried, a task a family: the cells that the store lacks, or has and are not trusted."""
    methods, checks = tuple(methods), tuple(checks)
    tasks = []
    for model_type in families:
        current = (versions(), made_from(model_type), seed)
        known = {
            cell.key
            for cell in store.of(model_type)
            if trust is Trust.ALL
            or (trust is Trust.CURRENT and (cell.versions, cell.made_from, cell.seed) == current)
        }
        left = [(name, tuple(c for c in checks if (model_type, name, c) not in known)) for name in methods]
        if any(wanted for _, wanted in left):
            tasks.append(Task(model_type, tuple((method, wanted) for method, wanted in left if wanted), seed))
    return tuple(tasks)


def estimate(store: Store, tasks: Iterable[Task], jobs: int) -> float:
    """Return how many seconds these tasks will take, from the seconds of the cells of earlier runs.

    A family or a method that no run has tried counts as the mean of those that were.
    """
    twins: dict[str, float] = {}
    tried: dict[tuple[str, str], float] = {}
    for cell in store.cells:
        if cell.check is Check.TWIN:
            twins[cell.model_type] = cell.seconds
        else:
            tried[cell.model_type, cell.method] = tried.get((cell.model_type, cell.method), 0.0) + cell.seconds
    twin, method = mean(twins.values() or [_TWIN]), mean(tried.values() or [_METHOD])
    seconds = 0.0
    count = 0
    for task in tasks:
        count += 1
        seconds += twins.get(task.model_type, twin)
        seconds += sum(tried.get((task.model_type, name), method) for name, _ in task.methods)
    side_by_side = max(1, min(jobs, count))
    starts = 1 + count // (side_by_side * _FAMILIES_A_PROCESS)
    return seconds / side_by_side + starts * _START if count else 0.0


def run(
    store: Store,
    tasks: Iterable[Task],
    *,
    jobs: int = 1,
    time_limit: float = TIME_LIMIT,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Try every task, and add the cells to the store as they are made.

    A process works on one family at a time, with one thread. The cells that one is at when it dies are "failed";
    where it shows no sign of life for ``time_limit`` seconds, they are "unknown". The run goes on. An interrupted
    run loses no cell that was made.

    Args:
        jobs: processes side by side.
        on_progress: called after each method of each family: done and total are cells.

    Raises:
        OutputError: the store cannot be written.
    """
    tasks = tuple(tasks)
    report = on_progress or (lambda _progress: None)
    done, total = 0, sum(task.cells for task in tasks)
    report(Progress("starting", done, total))
    with _Crew(tasks, min(jobs, len(tasks)), time_limit) as crew:
        for what, cells in crew.results():
            store.add(cells)
            done += len(cells)
            report(Progress(what, done, total))


@dataclass
class _Member:
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


class _Crew:
    """The processes of a run. All of them are gone when the block ends, however it ends."""

    def __init__(self, tasks: Iterable[Task], jobs: int, time_limit: float) -> None:
        self._tasks = deque(tasks)
        self._jobs = jobs
        self._time_limit = time_limit
        self._members: list[_Member] = []
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._folder = tempfile.TemporaryDirectory(prefix="graftkit-")

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in tuple(self._members):
            self._end(member)
        self._folder.cleanup()

    def results(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        """Yield what was tried last and the cells that came of it, until no task is left."""
        while self._tasks or any(member.task for member in self._members):
            self._give()
            yield from self._received()
            yield from self._overdue()

    def _give(self) -> None:
        """Give every process without a task the next one, and start processes as long as some are missing."""
        while self._tasks and len([m for m in self._members if m.task]) < self._jobs:
            member = next((m for m in self._members if m.task is None), None) or self._start()
            member.task, member.prepared, member.proved = self._tasks.popleft(), None, 0
            member.families += 1
            member.alive_at = time.monotonic()
            with suppress(OSError):  # of a process that died meanwhile, which reading from it shows
                member.pipe.send(member.task)

    def _start(self) -> _Member:
        ours, theirs = self._context.Pipe()
        log = Path(self._folder.name) / f"{time.monotonic_ns()}.log"
        process = self._context.Process(target=work, args=(theirs, log), daemon=True)
        process.start()
        theirs.close()
        member = _Member(process, ours, log)
        self._members.append(member)
        return member

    def _received(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        oldest = min(member.alive_at for member in self._members)
        left = max(0.0, oldest + self._time_limit - time.monotonic())
        ready = wait([member.pipe for member in self._members], timeout=min(left, 1.0))
        for member in [member for member in self._members if member.pipe in ready]:
            try:
                message = member.pipe.recv()
            except (EOFError, OSError):
                yield from self._lost(member, _Loss.DIED, f"the process died: {_how(member)}")
                continue
            member.alive_at = time.monotonic()
            yield from self._handle(member, message)

    def _handle(self, member: _Member, message: object) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        if isinstance(message, Prepared):
            member.prepared = message
        elif isinstance(message, Proved) and member.task is not None:
            method, _ = member.task.methods[member.proved]
            member.proved += 1
            yield f"{member.task.model_type} {method}", message.cells
        elif isinstance(message, Finished):
            member.task = None
            if member.families >= _FAMILIES_A_PROCESS:
                self._end(member)

    def _overdue(self) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        now = time.monotonic()
        for member in tuple(self._members):
            if member.task is not None and now - member.alive_at > self._time_limit:
                said = f"it took longer than the limit of {self._time_limit:g} seconds"
                yield from self._lost(member, _Loss.OVERDUE, said)

    def _lost(self, member: _Member, loss: _Loss, said: str) -> Iterator[tuple[str, tuple[Cell, ...]]]:
        """End a process, yield the cells that it was at, and put what it had not begun back."""
        self._end(member)
        task = member.task
        if task is None:
            return
        left = task.methods[member.proved :]
        if member.prepared is not None and left[1:]:
            self._tasks.appendleft(replace(task, methods=left[1:]))
        for method, checks in left[:1] if member.prepared is not None else left:
            yield f"{task.model_type} {method}", _lost_cells(member, task, method, checks, loss, said)

    def _end(self, member: _Member) -> None:
        """End a process: on its own if it waits for a task, else at once."""
        if member.task is None:
            with suppress(OSError):
                member.pipe.send(None)
            member.process.join(_START)
        member.process.kill()
        member.process.join()
        member.pipe.close()
        self._members.remove(member)


def _how(member: _Member) -> str:
    member.process.join(timeout=10)
    status = member.process.exitcode
    return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _lost_cells(
    member: _Member, task: Task, method: str, checks: Iterable[Check], loss: _Loss, said: str
) -> tuple[Cell, ...]:
    prepared = member.prepared or Prepared(None, ())
    where = f"in {method}" if member.prepared is not None else "while the twin was built"
    evidence: Mapping[str, Any] = {"printed": _last_words(member.log)}
    seconds = round(time.monotonic() - member.alive_at, 3)
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
