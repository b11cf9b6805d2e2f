"""Tied weights: parameters that several names share."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of every parameter that has several, in definition order."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]
