"""Which layers a twin keeps: the fewest that show every kind the original has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from graftkit.twins.sizes.field_sizes import LAYER_COUNTS, is_count

# The layers i with i % period == offset are of another kind.
_PERIODS = [
    "attn_layer_period",
    "expert_layer_period",
    "decoder_sparse_step",
    "encoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_interval",
    "moe_layer_freq",
    "moe_every_n_layers",
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "global_attn_every_n_layers",
    "cross_attention_frequency",
    "cross_layer_interval",
    "full_attention_interval",
]
# A period without such a field changes the kind at (i + 1) % period == 0.
_OFFSETS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
# The first n layers are of another kind.
_PREFIXES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
# The last n layers are of another kind.
_SUFFIXES = ("num_kv_shared_layers",)
# Lists of layer indices.
_INDEX_LISTS = [
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "deepstack_visual_indexes",
    "attn_layer_indices",
    "global_attention_layers",
]
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


def shrink_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of one (sub-)configuration that change when it keeps only the layers it needs.

    Args:
        fields: the configuration's own fields, without its sub-configurations.

    Returns:
        New values for layer counts, per-layer lists, index lists, per-layer overrides and suffix counts.
        Stacks whose layers are all of one kind keep two.
    """
    counts = {name: fields[name] for name in LAYER_COUNTS if is_count(fields.get(name))}
    changed: dict[str, Any] = {name: min(count, _FEWEST) for name, count in counts.items()}
    total = _main_count(fields, counts)
    if total is None or total <= _FEWEST:
        return changed
    kept = _kept_layers(fields, total)
    changed |= {name: len(kept) for name, count in counts.items() if count == total}
    changed |= _renumbered(fields, total, kept)
    return changed


def _main_count(fields: Mapping[str, Any], counts: Mapping[str, int]) -> int | None:
    if not counts:
        return None
    lengths = {len(v) for v in fields.values() if isinstance(v, list)}
    return next((count for count in counts.values() if count in lengths), next(iter(counts.values())))


def _kept_layers(fields: Mapping[str, Any], total: int) -> list[int]:
    kinds = [_kind(fields, index, total) for index in range(total)]
    wanted = set(kinds)
    if _periods(fields):
        # A period counts from the first layer, so that only a prefix keeps each layer's kind.
        length = next(n for n in range(1, total + 1) if set(kinds[:n]) == wanted)
        return list(range(max(length, _FEWEST)))
    kept = {kinds.index(kind) for kind in wanted}
    return sorted(kept) if len(kept) >= _FEWEST else list(range(_FEWEST))


def _periods(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (period, offset) of every period that decides a layer's kind."""
    superseded = _superseded(fields)
    found: list[tuple[int, int]] = []
    for name in _PERIODS:
        period, offset = fields.get(name), fields.get(_OFFSETS.get(name, ""))
        if name not in superseded and is_count(period) and period > 1:
            found.append((period, offset if isinstance(offset, int) else period - 1))
    return found


def _kind(fields: Mapping[str, Any], index: int, total: int) -> Hashable:
    lists = [
        repr(value[index])
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == total and name not in _INDEX_LISTS
    ]
    superseded = _superseded(fields)
    members = [index in fields[name] for name in _INDEX_LISTS if _is_index_list(fields.get(name), total)]
    counted = [name for name in _PREFIXES if is_count(fields.get(name)) and name not in superseded]
    prefixes = [index < fields[name] for name in counted]
    suffixes = [index >= total - fields[name] for name in _SUFFIXES if is_count(fields.get(name))]
    periods = [index % period == offset for period, offset in _periods(fields)]
    return (*lists, *members, *prefixes, *suffixes, *periods, repr(_overrides_of(fields, index)))


def _superseded(fields: Mapping[str, Any]) -> set[str]:
    return {name for owner, names in _SUPERSEDED.items() if fields.get(owner) for name in names}


def _is_index_list(value: Any, total: int) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and 0 <= i < total for i in value)


def _overrides_of(fields: Mapping[str, Any], index: int) -> Any:
    overrides = fields.get("per_layer_config")
    if not isinstance(overrides, Mapping):
        return None
    return next((v for key, v in overrides.items() if int(key) == index), None)


def _renumbered(fields: Mapping[str, Any], total: int, kept: list[int]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _INDEX_LISTS and _is_index_list(value, total):
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
