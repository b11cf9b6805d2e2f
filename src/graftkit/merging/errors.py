"""What a merge refuses with."""

from __future__ import annotations

from graftkit.errors import GraftError


class MergeError(GraftError):
    """The adapter cannot be merged into this base, or the result did not pass its own verification."""

    code = "merge"
