"""What is special about a family of models: one file each, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from graftkit.families._base import IGNORED_LABEL, Bypassed, Family, Requirement, ServedTwin

__all__ = [
    "IGNORED_LABEL",
    "Bypassed",
    "Family",
    "Requirement",
    "ServedTwin",
    "all_families",
    "family_of",
    "geometry",
]


@cache
def all_families() -> tuple[Family, ...]:
    """Return every family in this folder, by file name. A model type claimed twice is an error in the files."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    families = tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)
    owners: dict[str, str] = {}
    for family in families:
        for model_type in family.model_types:
            if owners.setdefault(model_type, family.name) != family.name:
                raise RuntimeError(f"{model_type!r} is claimed by {owners[model_type]} and {family.name}")
    return families


def family_of(model_type: str | None) -> Family | None:
    """Return the family that covers a transformers model type, or None: most models need none."""
    return next((f for f in all_families() if model_type in f.model_types), None)


def geometry(hub_id: str) -> Mapping[str, Any] | None:
    """Return the public configuration of a released checkpoint, by hub id (case-insensitive), or None."""
    wanted = hub_id.lower()
    for family in all_families():
        for name, config in family.geometries.items():
            if name.lower() == wanted:
                return config
    return None
