"""The one sink: data to stdout, everything else to stderr, in the format that was asked for."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import IO, Any

from graftkit.errors import GraftError

SCHEMA_VERSION = 1


class Format(StrEnum):
    """How a result is written."""

    HUMAN = "human"
    JSON = "json"
    HTML = "html"
    SARIF = "sarif"
    GITHUB = "github"


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
        self,
        value: Any,
        text: str | None = None,
        page: Callable[[Any], Mapping[str, Any]] | None = None,
        other: Mapping[Format, Callable[[Any], str]] = MappingProxyType({}),
    ) -> None:
        """Write a result in the format that was asked for.

        Args:
            value: the result; as JSON it is its ``to_dict()``, or itself where it is a mapping.
            text: it for people, where ``str(value)`` is not that.
            page: from it to the data of its page, for HTML.
            other: the further formats that this kind of result has.

        Raises:
            GraftError: ``format-unsupported``: this result has no such form.
        """
        if self.format is Format.JSON:
            fields = value if isinstance(value, dict) else value.to_dict()
            self._print(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))
        elif self.format is Format.HUMAN:
            self._print(str(value) if text is None else text)
        elif self.format is Format.HTML and page is not None:
            from graftkit.report.html import render_report

            self._print(render_report(page(value)))  # type: ignore[arg-type]
        elif self.format in other:
            self._print(other[self.format](value))
        else:
            raise _unsupported(self.format)

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


def _unsupported(wanted: Format) -> GraftError:
    return GraftError(
        f"this result has no {wanted} form",
        help="--format human or --format json",
        code="format-unsupported",
    )


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
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        # What libraries tell each other about their next version; nothing the user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield output
        except KeyboardInterrupt as stop:
            # Said here, because the command-line library turns it into a bare exit status.
            raise InterruptError from stop


def progress_console() -> Any:
    """A rich console on stderr, for progress and notes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
