"""Some rows of a dataset, read without consuming it."""

from __future__ import annotations

from typing import Any


def spread_rows(dataset: Any, count: int) -> list[Any]:
    """Return at most ``count`` rows, evenly spread and in order; the first ones of a stream.

    Empty for a dataset that has neither a length nor a ``take``.
    """
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        size = len(dataset)
        taken = min(count, size)
        return [dataset[at * size // taken] for at in range(taken)]
    if hasattr(dataset, "take"):  # a stream of the datasets library; take() starts it from its beginning
        return list(dataset.take(count))
    inner = getattr(dataset, "dataset", None)
    return spread_rows(inner, count) if inner is not None else []


def size_of(dataset: Any) -> int | None:
    """Return the number of rows; None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None
