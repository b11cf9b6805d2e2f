"""Attention of a twin: heads, the keys and values they share, their widths, and the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graftkit.twins.sizes.field_sizes import HEAD_DIM, HEADS, HIDDEN, WIDTHS, first_count, is_count

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
_HEADS = ("num_attention_heads", "num_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads")
_HEAD_DIMS = ("head_dim", "d_head")


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
    return changed | _head_dim(own, new)


def shrink_latent_heads(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the proportion between the rotated part of a latent-attention head and the rest, and their sum."""
    rope, nope = own.get("qk_rope_head_dim"), own.get("qk_nope_head_dim")
    if not (is_count(rope) and is_count(nope)):
        return {}
    new_rope = new["qk_rope_head_dim"]
    new_nope = min(nope, max(1, min(3, round(nope / rope))) * new_rope)
    sums = {rope: new_rope, rope + nope: new_rope + new_nope}
    heads = {
        name: sums[own[name]] for name in ("head_dim", "qk_head_dim", "swa_head_dim") if own.get(name) in sums
    }
    return {"qk_nope_head_dim": new_nope, **heads}


def shrink_latent_heads_of_layers(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a head size that is the sum of the rotated part and of what some layers have beside it."""
    before, after = (_unrotated(fields.get("per_layer_config")) for fields in (own, new))
    rope = own.get("qk_rope_head_dim")
    if len(before) != 1 or len(after) != 1 or not is_count(rope) or own.get("head_dim") != rope + min(before):
        return {}
    return {"head_dim": new["qk_rope_head_dim"] + min(after)}


def _unrotated(layers: Any) -> set[int]:
    values = layers.values() if isinstance(layers, Mapping) else ()
    return {layer["qk_nope_head_dim"] for layer in values if "qk_nope_head_dim" in layer}


def _head_dim(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let heads that filled the hidden size still fill it, and others still not."""
    head_dim, heads, width = first_count(own, _HEAD_DIMS), first_count(own, _HEADS), first_count(own, WIDTHS)
    is_latent = {"qk_rope_head_dim", "qk_nope_head_dim"} <= set(own)
    if is_latent or head_dim is None or heads is None or width is None:
        return {}
    filled = own[head_dim] * own[heads] == own[width]
    return {head_dim: new[width] // new[heads] if filled else min(own[head_dim], 2 * HEAD_DIM)}


def shrink_heads_of_stages(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let the heads of stages that double their width keep their share of it."""
    heads, width = own.get("num_heads"), first_count(own, ("embed_dim",))
    if width is None or not isinstance(heads, list) or not heads or not all(is_count(n) for n in heads):
        return {}
    first = max(1, heads[0] * new[width] // own[width])
    return {"num_heads": [number * first // heads[0] for number in heads]}


def shrink_rope(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the lists of one value a frequency to the new head size."""
    size = _rotary_size({**own, **new})
    ropes = {name: own.get(name) for name in ("rope_parameters", "rope_scaling")}
    return {name: _rope_mapping(rope, size) for name, rope in ropes.items() if isinstance(rope, Mapping)}


def _rotary_size(fields: Mapping[str, Any]) -> int:
    """Return the size of the part of a head that rotates."""
    stated = first_count(fields, ("qk_rope_head_dim", "head_dim"))
    if stated is not None:
        return int(fields[stated])
    width, heads = first_count(fields, WIDTHS), first_count(fields, _HEADS)
    return int((fields[width] if width else HIDDEN) // (fields[heads] if heads else 1))


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
