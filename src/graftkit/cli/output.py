"""The one sink of all commands: data to stdout, everything else to stderr, in the format that was asked for."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any

from graftkit._version import SCHEMA_VERSION
from graftkit.errors import GraftError

# 128 + SIGINT, as a shell reports a program that Ctrl-C ended.
INTERRUPTED = 130


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
        data: the stream for results: the process's own stdout.
    """

    format: Format
    data: IO[str]

    @property
    def command(self) -> str:
        """The command that is running, as it was typed."""
        return shlex.join(["graft", *sys.argv[1:]])

    def result(self, value: Any, **forms: Callable[[], str]) -> None:
        """Write a result in the format that was asked for.

        Args:
            value: the result: ``to_dict()`` is its JSON and ``str()`` its text, unless ``human`` gives another.
            forms: format -> how to write the result in it: ``html=…``, ``human=…``. The command's option offers
                these and no other.
        """
        if self.format is Format.JSON:
            fields = value if isinstance(value, dict) else value.to_dict()
            self._print(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))
        else:
            form = {Format.HUMAN: lambda: str(value), **forms}[self.format]
            self._print(form())

    def step(self, text: str) -> None:
        """Write a step of a long result: data for people, a note on stderr where JSON is the data."""
        if self.format is Format.HUMAN:
            self._print(text + "\n")
        else:
            self.note(text + "\n")

    def note(self, text: str) -> None:
        """Write to stderr what is not part of the result."""
        sys.stderr.write(text + "\n")

    def error(self, error: GraftError) -> None:
        """Write an error: JSON to stdout where JSON was asked for, else text to stderr."""
        if self.format is Format.JSON:
            fields = {"schema_version": SCHEMA_VERSION, "error": error.to_dict()}
            self._print(json.dumps(fields, indent=2))
        else:
            self.note(f"error: {error}")

    def _print(self, text: str) -> None:
        try:
            self.data.write(text + "\n")
            self.data.flush()
        except OSError as error:
            raise StdoutLostError(error) from error


class StdoutLostError(GraftError):
    """Results can no longer be written to stdout."""

    code = "output-not-writable"

    def __init__(self, error: OSError) -> None:
        super().__init__("the result cannot be written", where="stdout", why=error.strerror)


class InterruptError(GraftError):
    """The user pressed Ctrl-C."""

    code = "interrupted"

    def __init__(self) -> None:
        super().__init__("interrupted", help="no half-written file was left behind; run the command again")


@contextmanager
def only_data_on_stdout(output_format: Format, *, json: bool = False) -> Iterator[Output]:
    """Send what libraries print to stderr: stdout carries the result alone. ``json`` overrides the format."""
    output = Output(Format.JSON if json else output_format, sys.stdout)
    # Its import warns about an optional kernel that is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        # Notes between libraries about their next versions: the user cannot act on them.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield output
        except KeyboardInterrupt as stop:
            # Converted here because Typer turns it into a bare exit status.
            raise InterruptError from stop
