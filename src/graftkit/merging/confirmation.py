"""The plan of a merge in its own process: transformers and PEFT are imported there, while files are written here.

``python -m graftkit.merging.confirmation`` reads a request from stdin and writes an answer to stdout, as JSON.
Without a usable answer the caller makes the plan itself: it then takes longer, and nothing else changes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from graftkit import errors
from graftkit.adapters.file import read_adapter
from graftkit.errors import GraftError
from graftkit.merging.checkpoint.base import read_base
from graftkit.merging.fingerprint import fingerprint
from graftkit.merging.plan import MergePlan, WeightedAdapter, make_plan


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


@contextmanager
def confirming(draft: MergePlan, base: str, revision: str | None) -> Iterator[Confirmation]:
    """Let another process make the plan of a draft's merge during the block.

    Args:
        draft: for adapters in folders, and without a choice for tied weights.
        base, revision: as for :func:`graftkit.merging.merge.merge`.

    Raises:
        RejectedError: no process can be started.
    """
    adapters = [(str(adapter.file.folder), adapter.weight) for adapter in draft.adapters]
    request = json.dumps({"base": base, "adapters": adapters, "revision": revision}).encode()
    # A module in the working directory must not be taken for one of ours.
    command = [sys.executable, "-P", "-m", __name__]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise RejectedError(None) from error
    with process, ThreadPoolExecutor(1) as waiting:
        try:
            yield Confirmation(waiting.submit(lambda: _plan(draft, process.communicate(request)[0])))
        finally:
            process.kill()


def _plan(draft: MergePlan, given: bytes) -> MergePlan:
    answer = _parsed(given)
    if "error" in answer:
        raise RejectedError(_error(answer["error"]))
    if answer.get("fingerprint") != fingerprint(draft):
        raise RejectedError(None)
    return replace(draft, unknown_keys=answer["unknown_keys"], missing_buffers=answer["missing_buffers"])


def _parsed(answer: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(answer)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _error(fields: Mapping[str, str | None]) -> GraftError | None:
    """Return the error that was raised in the other process; None if it has more than the fields of all errors."""
    kind = getattr(errors, str(fields["kind"]), None)
    if kind is None or kind.__init__ is not GraftError.__init__:
        return None
    given = {name: fields[name] for name in ("where", "why", "help", "code")}
    return kind(fields["what"], **given)  # type: ignore[no-any-return]


def main() -> None:
    """Answer the request on stdin."""
    # Importing bitsandbytes would load torch's compiler. Nothing is compiled here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Modules are never freed: collecting garbage among them finds none.
    gc.set_threshold(100_000, 20, 50)
    with redirect_stdout(sys.stderr):
        answer = _answer(json.load(sys.stdin))
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # freeing it all takes longer than the answer may


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        adapters = [WeightedAdapter(read_adapter(path), weight) for path, weight in request["adapters"]]
        plan = make_plan(read_base(request["base"], revision=request["revision"]), adapters, None)
        return {
            "fingerprint": fingerprint(plan),
            "unknown_keys": plan.unknown_keys,
            "missing_buffers": plan.missing_buffers,
        }
    except GraftError as error:
        return {"error": {"kind": type(error).__name__, **error.to_dict()}}


if __name__ == "__main__":
    main()
