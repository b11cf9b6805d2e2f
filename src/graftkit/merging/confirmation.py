"""The plan of a merge, made by a copy of this process, which imports PEFT while the first files are written.

The copy begins with what is imported already, PyTorch above all. Without a usable answer from it the caller makes
the plan itself: it then takes longer, and nothing else changes.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from graftkit import errors
from graftkit.errors import GraftError
from graftkit.merging.checkpoint.base import read_base
from graftkit.merging.fingerprint import fingerprint
from graftkit.merging.plan import MergePlan, make_plan
from graftkit.process import collect_garbage_seldom, load_no_compiler

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class RejectedError(Exception):
    """A draft is not the plan.

    Attributes:
        refusal: why there is no plan at all; None where it has to be made to know.
    """

    def __init__(self, refusal: GraftError | None) -> None:
        super().__init__(refusal)
        self.refusal = refusal


@dataclass(frozen=True)
class Confirmation:
    """What the other process says of a draft, once it has.

    Attributes:
        confirmed: the plan, or :class:`RejectedError`.
    """

    confirmed: Future[MergePlan]

    def check(self) -> None:
        """Raise as :meth:`plan`, but only if the answer is there by now."""
        if self.confirmed.done():
            self.plan()

    def plan(self) -> MergePlan:
        """Wait for the answer, and return the plan.

        Raises:
            RejectedError: it is not the draft.
        """
        return self.confirmed.result()


def can_confirm() -> bool:
    """Check whether a copy of this process would run: what other threads have locked stays locked in it."""
    alone = sys.platform == "linux" and threading.active_count() == 1
    return alone and not multiprocessing.current_process().daemon  # such a process must not start others


@contextmanager
def confirming(draft: MergePlan, base: str, revision: str | None) -> Iterator[Confirmation]:
    """Let a copy of this process make the plan of a draft's merge during the block.

    Args:
        draft: without a choice for tied weights; :func:`can_confirm` has allowed it.
        base, revision: as for :func:`graftkit.merging.merge.merge`.

    Raises:
        RejectedError: this process cannot be copied.
    """
    import torch  # noqa: F401  # so that the copy need not

    context = multiprocessing.get_context("fork")
    answers, writer = context.Pipe(duplex=False)
    copy = context.Process(target=_reply, args=(writer, draft, base, revision), daemon=True)
    with answers:
        with writer:
            try:
                copy.start()
            except OSError as error:
                raise RejectedError(None) from error
        with ThreadPoolExecutor(1) as waiting:
            try:
                yield Confirmation(waiting.submit(lambda: _plan(draft, _received(answers))))
            finally:
                copy.kill()
                copy.join()


def _received(answers: Connection) -> Mapping[str, Any]:
    """Wait for the copy's answer; an empty one is that of a copy that ended without."""
    try:
        return cast("Mapping[str, Any]", json.loads(answers.recv_bytes()))
    except (EOFError, OSError):
        return {}


def _plan(draft: MergePlan, answer: Mapping[str, Any]) -> MergePlan:
    if "error" in answer:
        raise RejectedError(_error(answer["error"]))
    if answer.get("fingerprint") != fingerprint(draft):
        raise RejectedError(None)
    return replace(draft, unknown_keys=answer["unknown_keys"], missing_buffers=answer["missing_buffers"])


def _error(fields: Mapping[str, str | None]) -> GraftError | None:
    """Return the error that was raised in the other process; None if it has more than the fields of all errors."""
    kind = getattr(errors, str(fields["kind"]), None)
    if kind is None or kind.__init__ is not GraftError.__init__:
        return None
    given = {name: fields[name] for name in ("where", "why", "help", "code")}
    return kind(fields["what"], **given)  # type: ignore[no-any-return]


# ---- the copy ----


def _reply(writer: Connection, draft: MergePlan, base: str, revision: str | None) -> None:
    _be_quiet()
    writer.send_bytes(json.dumps(_answer(draft, base, revision)).encode())


def _be_quiet() -> None:
    """Make a copy quiet and single-threaded, and keep it from writing to the memory that it shares."""
    import torch

    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    torch.set_num_threads(1)
    load_no_compiler()
    collect_garbage_seldom()
    gc.freeze()  # collecting writes to every object


def _answer(draft: MergePlan, base: str, revision: str | None) -> dict[str, Any]:
    try:
        plan = make_plan(read_base(base, revision=revision), draft.adapters, None)
        return {
            "fingerprint": fingerprint(plan),
            "unknown_keys": plan.unknown_keys,
            "missing_buffers": plan.missing_buffers,
        }
    except GraftError as error:
        return {"error": {"kind": type(error).__name__, **error.to_dict()}}
