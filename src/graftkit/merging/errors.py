"""What a merge refuses with, and how it tells a file that cannot be read: whose it is decides."""

from __future__ import annotations

from pathlib import Path

from graftkit.errors import AdapterError, GraftError, OutputError, SourceError


class MergeError(GraftError):
    """The adapter cannot be merged into this base, or the result did not pass its own verification."""

    code = "merge"


def base_unreadable(path: Path, why: str) -> GraftError:
    """A file of the base went, or broke, after its header had been read."""
    return SourceError(
        "a file of the base cannot be read",
        where=str(path),
        why=why,
        help="restore it (compare its size with the one on the model's page), and run the merge again",
        code="not-readable",
    )


def adapter_unreadable(path: Path, why: str) -> GraftError:
    """As :func:`base_unreadable`, of an adapter."""
    return AdapterError(
        "the adapter's weights cannot be read",
        where=str(path),
        why=why,
        help="restore the file (compare its size with the original's), and run the merge again",
        code="adapter-weights",
    )


def output_unreadable(path: Path, why: str) -> GraftError:
    """A file of the merged checkpoint cannot be read back."""
    return OutputError(
        "the merged checkpoint cannot be read back",
        where=str(path),
        why=why,
        help="check the disk that it lies on, and merge again",
        code="output-not-readable",
    )
