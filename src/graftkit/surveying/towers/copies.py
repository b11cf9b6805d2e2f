"""Modules that run a tower's own weights a second time, as a decoder that is its encoder again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftkit.surveying.ties import tied_names
from graftkit.surveying.towers.modules import ancestors, is_inside

if TYPE_CHECKING:
    from torch import nn


def copies_of(claims: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Return path -> tower of the modules beside the claimed ones most of whose weights are one tower's.

    Args:
        claims: path -> tower of what is placed already.
    """
    shared: Counter[tuple[str, str]] = Counter()
    for names in tied_names(model):
        towers = {claims[path]: path for name in names if (path := _claim(name, claims)) is not None}
        if len(towers) == 1:
            (tower,) = towers
            shared.update((_beside(name, claims), tower) for name in names if _claim(name, claims) is None)
    return {path: tower for (path, tower), count in shared.items() if 2 * count > _weights_in(model, path)}


def _claim(name: str, claims: Mapping[str, str]) -> str | None:
    return next((path for path in (name, *ancestors(name)) if path in claims), None)


def _beside(name: str, claims: Mapping[str, str]) -> str:
    """Return the largest module around a weight that holds nothing of what is claimed."""
    around = [path for path in ancestors(name) if not any(is_inside(claim, path) for claim in claims)]
    return around[-1] if around else name.rpartition(".")[0]


def _weights_in(model: nn.Module, path: str) -> int:
    return sum(1 for _ in model.get_submodule(path).parameters())
