"""What a process of a run does: families one after the other, until the pipe brings None."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.matrix.cell import Cell, Check

if TYPE_CHECKING:
    from graftkit.matrix.trials.subject import Subject


@dataclass(frozen=True)
class Task:
    """What is to be tried on one family.

    Attributes:
        methods: method -> the checks to make cells of, in the order in which they are tried.
    """

    model_type: str
    methods: tuple[tuple[str, tuple[Check, ...]], ...]
    seed: int = 0

    @property
    def cells(self) -> int:
        """How many cells it makes."""
        return sum(len(checks) for _, checks in self.methods)


@dataclass(frozen=True)
class Prepared:
    """Sent when a family's twin was built, or could not be."""

    model_class: str | None
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class Proved:
    """Sent when one method was tried."""

    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Finished:
    """Sent when all methods of a task were tried."""


def work(pipe: Connection, log: Path) -> None:
    """Try each `Task` that the pipe brings until it brings None, and send what comes of it.

    Args:
        log: where everything goes that libraries print; its end says why a process died.
    """
    _be_quiet(log)
    _load()
    while (task := pipe.recv()) is not None:
        _work_on(task, pipe)


def _be_quiet(log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that keeps the cells
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model type needs no download
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(target, stream.fileno())
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


def _load() -> None:
    """Import what every family needs, so that no family's seconds have it."""
    import torch

    import graftkit.matrix.prove  # noqa: F401

    torch.set_num_threads(1)
    with suppress(ImportError):  # the checks that need it say so
        import bitsandbytes  # noqa: F401


def _work_on(task: Task, pipe: Connection) -> None:
    from graftkit.matrix.prove import prove_method
    from graftkit.matrix.trials.subject import prepare

    subject: Subject = prepare(task.model_type, seed=task.seed)
    pipe.send(Prepared(subject.model_class, subject.modalities))
    for method, checks in task.methods:
        pipe.send(Proved(prove_method(subject, method, checks)))
    pipe.send(Finished())
