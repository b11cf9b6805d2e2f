"""Were the bounds of the base's wrappers around the linears while an adapter was trained?

A tool that puts its adapter layer, or the plain linear, in a wrapper's place takes the bounds away. One that
keeps them may save tensors of the same names: the files cannot tell the two apart. What is known is stated in the
weights file's metadata, which PEFT ignores, and which stays with the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from graftkit.adapters.file import AdapterFile
from graftkit.surveying.sites import Site

# In the metadata of a safetensors file.
METADATA_KEY = "graftkit_wrapper_bounds"


class TrainedBounds(StrEnum):
    """Whether the bounds were in place while an adapter was trained; the value is what the metadata says."""

    KEPT = "kept"
    REMOVED = "removed"
    UNKNOWN = "unknown"


def stated_bounds(file: AdapterFile) -> TrainedBounds | None:
    """Return what the weights file states, None where it states nothing."""
    stated = file.header.metadata.get(METADATA_KEY)
    return TrainedBounds(stated) if stated in list(TrainedBounds) else None


def trained_bounds(file: AdapterFile, adapted: Iterable[tuple[str, Site]]) -> TrainedBounds | None:
    """Return what is known about the bounds of the adapted linears, None where nothing speaks against them.

    Args:
        adapted: module's path in the file, and the site that it belongs to.
    """
    bounded = [(name, site) for name, site in adapted if site.wrapper is not None and site.wrapper.bounded]
    if not bounded:
        return None
    in_place = any(name != site.path for name, site in bounded)
    return stated_bounds(file) or (TrainedBounds.UNKNOWN if in_place else None)
