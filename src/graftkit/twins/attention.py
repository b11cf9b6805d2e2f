"""Attention of a twin: heads, the keys and values they share, their widths, and the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graftkit.twins.field_sizes import HEAD_DIM, HEADS, HIDDEN, WIDTHS, first_count, is_count

# Key/value heads and the query heads they are shared by.
_KV_PAIRS = (
    (
        ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"),
        ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    ),
    (("swa_num_key_value_heads",), ("swa_num_attention_heads",)),
    (("encoder_num_key_value_heads",), ("encoder_num_attention_heads", "encoder_attention_heads")),
    (("decoder_num_key_value_heads",), ("decoder_num_attention_heads", "decoder_attention_heads")),
    (("linear_num_key_heads",), ("linear_num_value_heads",)),
    (("num_global_key_value_heads",), ("num_attention_heads",)),
)
_HEADS = ("num_attention_heads", "num_heads")


def shrunk_heads(value: int) -> int:
    """Return at most four query heads, and a power of two so that every width divides by it."""
    return 1 << int(math.log2(min(value, HEADS)))


def _kv_heads(value: int, heads: int, new_heads: int) -> int:
    """Keep multi-query at one head, multi-head at one per query head, grouped in between."""
    if value >= heads:
        return new_heads
    return 1 if value == 1 else max(1, new_heads // 2)


def shrink_heads(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key and value heads, and the head size, that go with the new number of query heads."""
    changed: dict[str, Any] = {}
    for kv_names, head_names in _KV_PAIRS:
        heads = first_count(own, head_names)
        for kv in kv_names:
            if heads and is_count(own.get(kv)):
                changed[kv] = _kv_heads(own[kv], own[heads], new[heads])
    changed |= _head_dim(own, new)
    return changed


def split_latent_heads(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the proportion between the rotated part of a latent-attention head and the rest."""
    rope, nope = own.get("qk_rope_head_dim"), own.get("qk_nope_head_dim")
    if not (is_count(rope) and is_count(nope)):
        return {}
    ratio = max(1, min(3, round(nope / rope)))
    return {"qk_nope_head_dim": min(nope, ratio * new["qk_rope_head_dim"])}


def _head_dim(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let heads that filled the hidden size still fill it, and others still not."""
    if {"qk_rope_head_dim", "qk_nope_head_dim"} <= set(own):
        return _latent_head_dims(own, new)
    head_dim = own.get("head_dim")
    heads = first_count(own, _HEADS)
    width = first_count(own, WIDTHS)
    if not is_count(head_dim) or heads is None or width is None:
        return {}
    filled = head_dim * own[heads] == own[width]
    natural = new[width] // new[heads]
    return {"head_dim": min(head_dim, natural if filled else 2 * HEAD_DIM)}


def _latent_head_dims(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    rope, nope = own["qk_rope_head_dim"], own["qk_nope_head_dim"]
    if not (is_count(rope) and is_count(nope)):
        return {}
    sums = {rope: new["qk_rope_head_dim"], rope + nope: new["qk_rope_head_dim"] + new["qk_nope_head_dim"]}
    return {k: sums[own[k]] for k in ("head_dim", "qk_head_dim") if own.get(k) in sums}


def shrink_rope(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the lists of one value a frequency to the new head size."""
    changed: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(name), Mapping):
            changed[name] = _rope_mapping(own[name], _rotary_size(own, new))
    return changed


def _rotary_size(own: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    merged = {**own, **new}
    if is_count(merged.get("qk_rope_head_dim")):
        return int(merged["qk_rope_head_dim"])
    if is_count(merged.get("head_dim")):
        return int(merged["head_dim"])
    width, heads = first_count(merged, WIDTHS), first_count(merged, _HEADS)
    return int((merged[width] if width else HIDDEN) // (merged[heads] if heads else 1))


def _rope_mapping(rope: Mapping[str, Any], size: int) -> dict[str, Any]:
    pairs = int(size * (rope.get("partial_rotary_factor") or 1.0)) // 2
    changed: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            changed[name] = _rope_mapping(value, size)
        elif name == "mrope_section" and isinstance(value, list):
            changed[name] = _sections(value, pairs)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            changed[name] = value[:pairs]
        else:
            changed[name] = value
    return changed


def _sections(sections: list[int], total: int) -> list[int]:
    """Return sections in the old proportions, none empty where there is room, that sum to ``total``."""
    if sum(sections) <= total:
        return sections
    parts = [max(1, math.floor(total * part / sum(sections))) for part in sections]
    parts[0] += total - sum(parts)
    return parts
