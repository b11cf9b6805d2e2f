"""What must not be shrunk, so that a twin has every kind of module of the full model: found by building."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.surveying.sources.build import build_on_meta
from graftkit.twins.budget import within
from graftkit.twins.faithful.differences import Difference, differences
from graftkit.twins.shrink import changed_fields, shrink
from graftkit.twins.sizes.field_sizes import LAYER_COUNTS, is_count
from graftkit.twins.sizes.kept import first_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_LAYERS = 32
# What building one twin without weights may take.
_SECONDS = 5.0


@dataclass(frozen=True)
class KeptStructure:
    """What is kept for the sake of the structure.

    Attributes:
        kept: patterns over the configuration's fields.
        differs: in what the twin's structure differs from the full model's all the same.
    """

    kept: frozenset[str]
    differs: tuple[Difference, ...]


def keep_structure(
    full: PreTrainedModel, overrides: Mapping[str, Any] | None = None, *, seconds: float = 25.0
) -> KeptStructure:
    """Return what to keep so that nothing of the structure is lost.

    One field after the other is tried, on the meta device: first more layers, the fewest of each part that bring
    back what they can, then each other size.

    Args:
        full: the full model, on the meta device.
        overrides: values that every twin has.
        seconds: how long to try; what is lost by then stays lost.

    Raises:
        BuildError: the most shrunken twin cannot be built.
    """
    until = time.thread_time() + seconds
    best = compare(full, frozenset(), overrides)
    sizes = {
        path: (whole, small)
        for path, (whole, small) in changed_fields(full.config, overrides).items()
        if is_count(whole) and is_count(small)
    }
    of_layers = {path for path in sizes if path.rpartition(".")[2] in LAYER_COUNTS}
    for path in sorted(sizes, key=lambda path: path not in of_layers):
        if not best.differs or time.thread_time() > until:
            break
        better = _with(best, path, full, overrides)
        if path in of_layers and better is not best:
            whole, small = sizes[path]
            numbers = range(small + 1, min(whole, _MOST_LAYERS) + 1)
            fewer = (_with(best, first_layers(path, number), full, overrides) for number in numbers)
            better = next((one for one in fewer if len(one.differs) <= len(better.differs)), better)
        best = better
    return best


def compare(full: PreTrainedModel, kept: frozenset[str], overrides: Mapping[str, Any] | None) -> KeptStructure:
    """Return in what the twin that keeps these fields is built otherwise than the full model.

    Raises:
        BuildError: that twin cannot be built, or not on the meta device.
    """
    twin = build_on_meta(shrink(full.config, overrides, kept=kept), type(full))
    return KeptStructure(kept, differences(full, twin))


def _with(
    best: KeptStructure, pattern: str, full: PreTrainedModel, overrides: Mapping[str, Any] | None
) -> KeptStructure:
    """Return what is kept with this pattern too where that brings something back, else ``best`` itself."""
    try:
        with within(_SECONDS):
            found = compare(full, best.kept | {pattern}, overrides)
    except BuildError:
        return best
    return found if len(found.differs) < len(best.differs) else best
