"""The one sink: data to stdout, everything else to stderr, in the format that was asked for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any

from graftkit.errors import GraftError

SCHEMA_VERSION = 1


class Format(StrEnum):
    """How a result is written."""

    HUMAN = "human"
    JSON = "json"
    HTML = "html"


@dataclass(frozen=True)
class Output:
    """Where a command's result and its errors go.

    Attributes:
        format: of results and errors.
        data: the stream for results: the process's own stdout.
    """

    format: Format
    data: IO[str]

    def result(
        self, value: Any, text: str | None = None, page: Callable[[Any], Mapping[str, Any]] | None = None
    ) -> None:
        """Write a result: its ``to_dict()`` as JSON, ``text`` (or ``str(value)``) for people, or its ``page``.

        Raises:
            GraftError: ``format-unsupported``: HTML was asked for, and this result has no page.
        """
        if self.format is Format.HTML:
            self._print(_rendered(value, page))
        elif self.format is Format.JSON:
            fields = value if isinstance(value, dict) else value.to_dict()
            self._print(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))
        else:
            self._print(str(value) if text is None else text)

    def say(self, text: str) -> None:
        """Write a step of a long result: data for people, a note on stderr where JSON is the data."""
        if self.format is not Format.HUMAN:
            sys.stderr.write(text + "\n\n")
        else:
            self._print(text + "\n")

    def error(self, error: GraftError) -> None:
        """Write an error: JSON to stdout where JSON was asked for, else text to stderr."""
        if self.format is Format.JSON:
            fields = {"schema_version": SCHEMA_VERSION, "error": error.to_dict()}
            self._print(json.dumps(fields, indent=2))
        else:
            sys.stderr.write(f"error: {error}\n")

    def _print(self, text: str) -> None:
        try:
            self.data.write(text + "\n")
            self.data.flush()
        except OSError as error:
            raise StdoutLostError(error) from error


def _rendered(value: Any, page: Callable[[Any], Any] | None) -> str:
    if page is None:
        raise GraftError(
            "this result has no page", help="--format human or --format json", code="format-unsupported"
        )
    from graftkit.report.html import render_report

    return render_report(page(value))


class StdoutLostError(GraftError):
    """Results cannot be written to stdout any more."""

    code = "output-not-writable"

    def __init__(self, error: OSError) -> None:
        super().__init__("the result cannot be written", where="stdout", why=error.strerror)


class InterruptError(GraftError):
    """The user pressed Ctrl-C."""

    code = "interrupted"

    def __init__(self) -> None:
        super().__init__("interrupted", help="nothing half-written was left behind; run it again when you like")


@contextmanager
def only_data_on_stdout(output_format: Format) -> Iterator[Output]:
    """Send whatever libraries print to stderr, so that stdout carries the result alone."""
    output = Output(output_format, sys.stdout)
    # It announces on import that an optional kernel is not installed: nothing the user asked about.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        try:
            yield output
        except KeyboardInterrupt as stop:
            # Said here, because the command-line library turns it into a bare exit status.
            raise InterruptError from stop


def progress_console() -> Any:
    """A rich console on stderr, for progress and notes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
