"""Errors of a conversion: what cannot be converted is merged instead, and the error has the command."""

from __future__ import annotations

import shlex

from graftkit.errors import GraftError, OutputError


class ConvertError(GraftError):
    """An adapter has no form in a dialect, or what was written is not equal to the original."""

    code = "convert"


def merge_instead(adapter: str, base: str | None) -> str:
    """Return the command that merges the adapter, for what no dialect can hold."""
    return f"merge instead: graft merge {shlex.join([base or 'BASE', adapter, 'MERGED'])}"


def not_writable(path: str, why: str) -> OutputError:
    """Return the error for a folder that the converted files cannot be written into."""
    return OutputError(
        "the converted adapter cannot be written",
        where=path,
        why=why,
        help="fix the cause and rerun",
        code="output-not-writable",
    )
