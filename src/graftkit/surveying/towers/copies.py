"""Modules that run a tower's own weights a second time, as a decoder that is its encoder again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from graftkit.surveying.towers.modules import Modules, ancestors, is_inside


def copies_of(claims: Mapping[str, str], modules: Modules) -> dict[str, str]:
    """Return path -> tower of the modules beside the claimed ones most of whose layers have one tower's weights.

    Args:
        claims: path -> tower of what is placed already.
    """
    shared: Counter[tuple[str, str]] = Counter()
    for paths in _by_weight(modules):
        towers = {claims[claim] for path in paths if (claim := _claim(path, claims)) is not None}
        if len(towers) == 1:
            (tower,) = towers
            shared.update((_beside(path, claims), tower) for path in paths if _claim(path, claims) is None)
    return {path: tower for (path, tower), count in shared.items() if 2 * count > len(modules.inside(path))}


def _by_weight(modules: Modules) -> Iterable[list[str]]:
    from torch import nn

    paths: defaultdict[int, list[str]] = defaultdict(list)
    for path, layer in modules.layers.items():
        weight = getattr(layer.module, "weight", None)
        if isinstance(weight, nn.Parameter):  # a parametrized one is another tensor each time
            paths[id(weight)].append(path)
    return paths.values()


def _claim(path: str, claims: Mapping[str, str]) -> str | None:
    return next((at for at in (path, *ancestors(path)) if at in claims), None)


def _beside(path: str, claims: Mapping[str, str]) -> str:
    """Return the largest module around a layer that holds nothing of what is claimed."""
    around = [at for at in (path, *ancestors(path)) if not any(is_inside(claim, at) for claim in claims)]
    return around[-1]
