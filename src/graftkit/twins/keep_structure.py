"""What must not be shrunk, so that a twin has every kind of module of the full model: found by building."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from graftkit.errors import BuildError
from graftkit.twins.faithful import Difference
from graftkit.twins.shrink import changed_fields
from graftkit.twins.sizes.field_sizes import LAYER_COUNTS, is_count
from graftkit.twins.sizes.kept import first_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# From patterns to what the structure of the twin that keeps them differs in from that of the full model.
Compare: TypeAlias = Callable[[frozenset[str]], tuple[Difference, ...]]
_MOST_LAYERS = 32


@dataclass(frozen=True)
class KeptStructure:
    """What is kept for the sake of the structure.

    Attributes:
        kept: patterns over the configuration's fields.
        differences: in what the twin's structure differs from the full model's all the same.
    """

    kept: frozenset[str]
    differences: tuple[Difference, ...]


def keep_structure(
    config: PretrainedConfig, compare: Compare, overrides: Mapping[str, Any] | None, until: float
) -> KeptStructure:
    """Return what to keep so that nothing of the structure is lost.

    One field after the other is tried: first more layers, the fewest of each part that bring back what they can,
    then each other size.

    Args:
        config: the full configuration.
        compare: as :data:`Compare`; raises ``BuildError`` where that twin cannot be built.
        overrides: values that every twin has.
        until: when to stop, on the monotonic clock.

    Raises:
        BuildError: the most shrunken twin cannot be built.
    """
    best = KeptStructure(frozenset(), compare(frozenset()))
    sizes = {
        path: (full, small)
        for path, (full, small) in changed_fields(config, overrides).items()
        if is_count(full) and is_count(small)
    }
    of_layers = {path for path in sizes if path.rpartition(".")[2] in LAYER_COUNTS}
    for path in sorted(sizes, key=lambda path: path not in of_layers):
        if not best.differences or time.monotonic() > until:
            break
        with_all = _with(best, path, compare)
        if path in of_layers and with_all is not best:
            full, small = sizes[path]
            numbers = range(small + 1, min(full, _MOST_LAYERS) + 1)
            fewer = (_with(best, first_layers(path, number), compare) for number in numbers)
            with_all = next((one for one in fewer if len(one.differences) <= len(with_all.differences)), with_all)
        best = with_all
    return best


def _with(best: KeptStructure, pattern: str, compare: Compare) -> KeptStructure:
    """Return what is kept with this pattern too where that brings something back, else ``best`` itself."""
    kept = best.kept | {pattern}
    try:
        differences = compare(kept)
    except BuildError:
        return best
    return replace(best, kept=kept, differences=differences) if len(differences) < len(best.differences) else best
