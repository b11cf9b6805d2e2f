"""What no gradient reaches in a class of models: found on a twin, as patterns that fit models of any depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.surveying.survey import survey
from graftkit.twins.reach import NoGradient, unreached
from graftkit.twins.reaching.patterns import all_but_last, generalize, meant_by

if TYPE_CHECKING:
    from torch import nn


def find_patterns(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return patterns for the sites of a twin that get no gradient on ``batch``, by the name of the cause.

    What is never called has a pattern only where all of its like are not, or all but the last of several layers:
    which experts run is up to a batch.
    """
    found = unreached(model, batch)
    paths = [site.path for site in survey(model)]
    patterns: dict[str, tuple[str, ...]] = {}
    for cause in NoGradient:
        some = [path for path, why in found.items() if why is cause]
        if cause is NoGradient.NOT_CALLED:
            layers = [path for path in some if "expert" not in path]
            general = (*generalize(_none_called(model, some, paths), paths), *all_but_last(layers, paths))
        else:
            general = generalize(some, paths)
        if general:
            patterns[cause.name.lower()] = general
    return patterns


def sites_meant(patterns: Mapping[str, Sequence[str]], paths: Sequence[str]) -> dict[str, NoGradient]:
    """Return the sites among ``paths`` that no gradient reaches, and why, by path.

    Args:
        patterns: by cause, as ``find_patterns`` returns them.
        paths: of all sites of a model of the same class, of any depth.
    """
    meant = {path: NoGradient[cause.upper()] for cause, some in patterns.items() for path in meant_by(some, paths)}
    return {path: meant[path] for path in paths if path in meant}


def _none_called(model: nn.Module, uncalled: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the paths among ``uncalled`` of which none that is the same member of a list is called."""
    called = {_without_numbers(model, path) for path in set(paths).difference(uncalled)}
    return [path for path in uncalled if _without_numbers(model, path) not in called]


def _without_numbers(model: nn.Module, path: str) -> str:
    """Return a path without the numbers of members of lists; ``fc1`` and ``fc2`` of one module stay two."""
    from torch import nn

    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    owner, parts = model, []
    for part in path.split("."):
        parts.append(re.sub(r"\d+", "#", part) if isinstance(owner, lists) else part)
        owner = getattr(owner, part)
    return ".".join(parts)
