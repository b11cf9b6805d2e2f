"""A tiny, random, live model of any architecture, and a batch to run it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftkit.twins.batch import example_batch
    from graftkit.twins.build import twin
    from graftkit.twins.shrink import shrink

__all__ = ["example_batch", "shrink", "twin"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {"example_batch": "batch", "twin": "build", "shrink": "shrink"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
