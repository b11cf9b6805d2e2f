"""Errors for files that a merge can no longer read: which of them it is decides the error and its code."""

from __future__ import annotations

from graftkit.errors import AdapterError, OutputError, SourceError


def base_unreadable(path: str, why: str) -> SourceError:
    """Make the error for a file of the base that is missing or broken."""
    return SourceError(
        "a file of the base cannot be read",
        where=path,
        why=why,
        help="restore it (compare its size with the one on the model's page), and run the merge again",
        code="not-readable",
    )


def adapter_unreadable(path: str, why: str) -> AdapterError:
    """Make the error for an adapter whose weights are missing or broken."""
    return AdapterError(
        "the adapter's weights cannot be read",
        where=path,
        why=why,
        help="restore the file (compare its size with the original's), and run the merge again",
        code="adapter-weights",
    )


def output_unreadable(path: str, why: str) -> OutputError:
    """Make the error for a file of the merged checkpoint that cannot be read back."""
    return OutputError(
        "the merged checkpoint cannot be read back",
        where=path,
        why=why,
        help="check the disk it is on, and merge again",
        code="output-not-readable",
    )
