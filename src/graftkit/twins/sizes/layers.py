"""Which layers a twin keeps: the fewest that show every kind the original has."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

from graftkit.twins.sizes.field_sizes import LAYER_COUNTS, is_count

# The layers i with i % period == offset are of another kind.
_PERIODS = re.compile(
    r"(layer_period|_interval|_frequency|layer_freq|sparse_step|layer_step|every_n_layers|sliding_window_pattern)$"
    r"|layers_per_\w*block"
)
# A period without such a field changes the kind at (i + 1) % period == 0.
_OFFSETS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
# The first n layers are of another kind.
_PREFIXES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
# The last n layers are of another kind.
_SUFFIXES = ("num_kv_shared_layers",)
# Lists of layer indices.
_INDEX_LISTS = re.compile(r"(layers|layer_ids|layers?_indices|layer_idxs|attn_idxs|(block|attn|visual)_indexes)$")
# Kinds of layers that repeat: layer i is of the kind i % length.
_CYCLES = re.compile(r"(_types|_pattern)$")
# Lists of one value a layer. Where one is given, the periods and prefixes that would generate it decide nothing.
_SUPERSEDED = {
    "layer_types": (
        "sliding_window_pattern",
        "global_attn_every_n_layers",
        "full_attention_interval",
        "attn_layer_period",
    ),
    "no_rope_layers": ("no_rope_layer_interval",),
    "moe_layers": ("interleave_moe_layer_step",),
    "mlp_layer_types": ("first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq"),
}
_FEWEST = 2


def shrink_layers(fields: Mapping[str, Any], *, first: int | None = None) -> dict[str, Any]:
    """Return the fields of one (sub-)configuration that change when it keeps only the layers it needs.

    Args:
        fields: the configuration's own fields, without its sub-configurations.
        first: keep that many layers from the first on; None for the fewest that show every kind.

    Returns:
        New values for layer counts, per-layer lists, index lists, per-layer overrides and suffix counts.
        Stacks whose layers are all of one kind keep two.
    """
    counts = {name: fields[name] for name in LAYER_COUNTS if is_count(fields.get(name))}
    changed: dict[str, Any] = {name: min(count, _FEWEST) for name, count in counts.items()}
    total = _main_count(fields, counts)
    if total is None or total <= _FEWEST:
        return changed
    kept = _kept_layers(fields, total) if first is None else list(range(min(first, total)))
    changed |= {name: len(kept) for name, count in counts.items() if count == total}
    changed |= _renumbered(fields, total, kept)
    return changed


def _main_count(fields: Mapping[str, Any], counts: Mapping[str, int]) -> int | None:
    if not counts:
        return None
    lengths = {len(v) for v in fields.values() if isinstance(v, list) and not _has_lists(v)}
    return next((count for count in counts.values() if count in lengths), next(iter(counts.values())))


def _has_lists(values: list[Any]) -> bool:
    """Check whether a list holds lists: of pairs and of points, not of one value a layer."""
    return any(isinstance(value, list | tuple) for value in values)


def _kept_layers(fields: Mapping[str, Any], total: int) -> list[int]:
    kinds = [_kind(fields, index, total) for index in range(total)]
    wanted = set(kinds)
    if _periods(fields) or _cycles(fields, total):
        # A period counts from the first layer, so that only a prefix keeps each layer's kind.
        length = next(n for n in range(1, total + 1) if set(kinds[:n]) == wanted)
        return list(range(max(length, _FEWEST)))
    kept = {kinds.index(kind) for kind in wanted}
    return sorted(kept) if len(kept) >= _FEWEST else list(range(_FEWEST))


def _periods(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (period, offset) of every period that decides a layer's kind."""
    superseded = _superseded(fields)
    found: list[tuple[int, int]] = []
    for name, period in fields.items():
        offset = fields.get(_OFFSETS.get(name, ""))
        if _PERIODS.search(name) and name.lstrip("_") not in superseded and is_count(period) and period > 1:
            found.append((period, offset if isinstance(offset, int) else period - 1))
    return found


def _cycles(fields: Mapping[str, Any], total: int) -> list[list[str]]:
    """Return the lists of kinds that are shorter than the layers, and repeat."""
    return [
        value
        for name, value in fields.items()
        if _CYCLES.search(name) and isinstance(value, list) and 1 < len(value) < total
        if all(isinstance(kind, str) for kind in value)
    ]


def _kind(fields: Mapping[str, Any], index: int, total: int) -> Hashable:
    lists = [
        repr(value[index])
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == total and not _is_index_list(name, value, total)
    ]
    superseded = _superseded(fields)
    members = [index in value for name, value in fields.items() if _is_index_list(name, value, total)]
    cycles = [kinds[index % len(kinds)] for kinds in _cycles(fields, total)]
    counted = [name for name in _PREFIXES if is_count(fields.get(name)) and name not in superseded]
    prefixes = [index < fields[name] for name in counted]
    suffixes = [index >= total - fields[name] for name in _SUFFIXES if is_count(fields.get(name))]
    periods = [index % period == offset for period, offset in _periods(fields)]
    return (*lists, *members, *cycles, *prefixes, *suffixes, *periods, repr(_overrides_of(fields, index)))


def _superseded(fields: Mapping[str, Any]) -> set[str]:
    return {name for owner, names in _SUPERSEDED.items() if fields.get(owner) for name in names}


def is_index_list(name: str, value: Any) -> bool:
    """Check whether a field lists indices of layers."""
    if not _INDEX_LISTS.search(name) or not isinstance(value, list):
        return False
    numbers = all(isinstance(index, int) and not isinstance(index, bool) for index in value)
    return numbers and all(index >= 0 for index in value) and value == sorted(set(value))


def _is_index_list(name: str, value: Any, total: int) -> bool:
    return is_index_list(name, value) and all(index < total for index in value)


def _overrides_of(fields: Mapping[str, Any], index: int) -> Any:
    overrides = fields.get("per_layer_config")
    if not isinstance(overrides, Mapping):
        return None
    return next((v for key, v in overrides.items() if int(key) == index), None)


def _renumbered(fields: Mapping[str, Any], total: int, kept: list[int]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in fields.items():
        if _is_index_list(name, value, total):
            new[name] = [position for position, index in enumerate(kept) if index in value]
        elif isinstance(value, list) and len(value) == total:
            new[name] = [value[index] for index in kept]
        elif name in _PREFIXES and isinstance(value, int):
            new[name] = sum(index < value for index in kept)
        elif name in _SUFFIXES and isinstance(value, int):
            new[name] = sum(index >= total - value for index in kept)
    if isinstance(fields.get("per_layer_config"), Mapping):
        overrides = [(position, _overrides_of(fields, index)) for position, index in enumerate(kept)]
        new["per_layer_config"] = {position: dict(own) for position, own in overrides if own is not None}
    return new
