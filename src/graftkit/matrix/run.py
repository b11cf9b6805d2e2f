"""A run: which cells are still to be made, how long that will take, and making them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from statistics import mean

from graftkit.matrix.cell import Check
from graftkit.matrix.processes.pool import FAMILIES_A_PROCESS, START, WorkerPool
from graftkit.matrix.processes.worker import Task
from graftkit.matrix.store import Store
from graftkit.matrix.trials.origin import made_from, versions
from graftkit.progress import Progress

# Seconds without a sign of life after which a family's process is ended: a twin, or one method's checks.
TIME_LIMIT = 300.0
# Where no earlier run says more: seconds for the twin of a family, and for a method.
_TWIN, _METHOD = 1.0, 1.0


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
    starts = 1 + count // (side_by_side * FAMILIES_A_PROCESS)
    return seconds / side_by_side + starts * START if count else 0.0


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
    with WorkerPool(tasks, min(jobs, len(tasks)), time_limit) as pool:
        for what, cells in pool.results():
            store.add(cells)
            done += len(cells)
            report(Progress(what, done, total))
