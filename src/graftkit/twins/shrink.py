"""A configuration of any size -> a tiny one of the same architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from graftkit.errors import BuildError
from graftkit.families import family_of
from graftkit.twins import field_sizes as rules
from graftkit.twins.layers import shrink_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from graftkit.families import Family

# Not part of the architecture: where the weights came from and how they were stored.
_DROPPED = (
    "quantization_config",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "name_or_path",
    "_name_or_path",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "compression_config",
    # Which stages a backbone hands out: named after layers that the twin may not have. The default is the last.
    "stage_names",
    "out_features",
    "out_indices",
)
_PATCHES_PER_SIDE = 4


def shrink(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A tiny copy of ``config``: widths near 64, a vocabulary of 512, one layer of every kind.

    Kept as they are: every kind of layer (attention pattern, dense and sparse, with and without shared
    keys and values, per-layer overrides), every tower, tied weights, whether attention is multi-head, grouped
    or multi-query, experts with top-k below their number, flags. A sub-configuration that is present stays
    present and one that is absent stays absent. Special tokens stay distinct and inside the vocabulary.

    Args:
        config: any transformers configuration. It is not changed.
        overrides: values the result must have; nested mappings address sub-configurations. They win over
            the family's overrides, which win over the generic rules.

    Raises:
        BuildError: code ``twin``, where the configuration's class refuses the values.
    """
    fields = _merged(_shrunk(config, _TokenIds(), None), overrides or {})
    try:
        small = type(config)(**fields)
    except Exception as error:
        raise BuildError(
            f"no twin: {type(config).__name__} refuses the shrunk values",
            where=config.model_type,
            why=f"{type(error).__name__}: {error}",
            help="pass overrides for the fields it names: gk.twin(source, overrides={...})",
            code="twin",
        ) from error
    small.architectures = copy.copy(config.architectures)
    return small


def _merged(fields: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in extra.items():
        inner = merged.get(name)
        if isinstance(value, Mapping) and name.endswith("_config") and inner is None:
            continue  # an override for a tower that this model does not have
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[name] = _merged(inner, value)
        else:
            merged[name] = copy.deepcopy(value)
    return merged


class _TokenIds:
    """Ids of special tokens, mapped into the twin's vocabulary; the same id always maps to the same one."""

    def __init__(self) -> None:
        self._new: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self(item) for item in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < rules.SPECIAL_IDS:
            return value
        room = rules.VOCAB - rules.SPECIAL_IDS
        return self._new.setdefault(value, rules.SPECIAL_IDS + len(self._new) % room)


def _shrunk(config: PretrainedConfig, tokens: _TokenIds, parent: Family | None) -> dict[str, Any]:
    """The fields of one configuration and, recursively, of its sub-configurations.

    A sub-configuration of another family than its parent's brings its own family's overrides.
    """
    fields = config.to_dict()
    family = family_of(config.model_type)
    subs = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {k: v for k, v in fields.items() if k not in subs and k not in _DROPPED}
    new = own | _shrink_own(own, tokens)
    for name, sub in subs.items():
        if hasattr(sub, "to_dict"):
            new[name] = _shrunk(sub, tokens, family)
        else:
            new[name] = copy.deepcopy(fields.get(name))
    new |= _tiles(new)
    return _merged(new, family.twin_overrides) if family and family is not parent else new


def _tiles(fields: Mapping[str, Any]) -> dict[str, Any]:
    """One tile an image, of the vision tower's own size, where images are cut into tiles."""
    vision = fields.get("vision_config")
    if not fields.get("image_grid_pinpoints") or not isinstance(vision, Mapping):
        return {}
    size = vision.get("image_size")
    return {"image_grid_pinpoints": [[size, size]]} if rules.is_count(size) else {}


def _shrink_own(own: Mapping[str, Any], tokens: _TokenIds) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in own.items():
        if rules.is_token_field(name):
            new[name] = tokens(value)
        elif name in rules.HEAD_COUNTS and rules.is_count(value):
            new[name] = rules.shrunk_heads(value)
        elif name in rules.TARGETS:
            new[name] = _sized(name, value)
    new |= _latent_split(own, new)
    new |= _experts(own, new)
    new |= _heads(own, new)
    new |= _state_space(own, new)
    new |= _codebooks(own, new)
    new |= _positions(own)
    new |= _image(own)
    layers = shrink_layers({**own, **{k: v for k, v in new.items() if isinstance(v, list)}})
    new |= layers
    if "per_layer_config" in layers:
        new["per_layer_config"] = _layer_overrides(own, new, layers["per_layer_config"])
    new |= _rope(own, new)
    return new


def _sized(name: str, value: Any) -> Any:
    """A size or a list of one size a layer; ratios within a list are kept."""
    target = rules.TARGETS[name]
    if isinstance(value, list) and value and all(rules.is_count(v) for v in value):
        smallest = min(value)
        return [min(smallest, target) * max(1, round(v / smallest)) for v in value]
    return min(value, target) if rules.is_count(value) else value


def _experts(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Top-k stays below the number of experts where it was, and one where it was one."""
    experts = next((k for k in own if k in _EXPERTS and rules.is_count(own[k])), None)
    top_k = next((k for k in own if k in _TOP_K and rules.is_count(own[k])), None)
    if experts is None or top_k is None:
        return {}
    if own[top_k] < own[experts] and new[top_k] >= new[experts]:
        return {top_k: max(1, new[experts] - 1)}
    return {}


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "num_selected_experts",
)
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
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def _heads(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for kv_names, head_names in _KV_PAIRS:
        heads = next((k for k in head_names if rules.is_count(own.get(k))), None)
        for kv in kv_names:
            if heads and rules.is_count(own.get(kv)):
                changed[kv] = rules.shrunk_kv_heads(own[kv], own[heads], new[heads])
    changed |= _head_dim(own, new)
    return changed


def _head_dim(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Heads that filled the hidden size still do; heads that did not still do not."""
    if {"qk_rope_head_dim", "qk_nope_head_dim"} <= set(own):
        return _latent_head_dims(own, new)
    head_dim = own.get("head_dim")
    heads = next((k for k in ("num_attention_heads", "num_heads") if rules.is_count(own.get(k))), None)
    width = next((k for k in _WIDTHS if rules.is_count(own.get(k))), None)
    if not rules.is_count(head_dim) or heads is None or width is None:
        return {}
    filled = head_dim * own[heads] == own[width]
    natural = new[width] // new[heads]
    return {"head_dim": min(head_dim, natural if filled else 2 * rules.HEAD_DIM)}


def _latent_split(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a latent-attention head without rotation keeps its proportion to the rotated part."""
    rope, nope = own.get("qk_rope_head_dim"), own.get("qk_nope_head_dim")
    if not (rules.is_count(rope) and rules.is_count(nope)):
        return {}
    ratio = max(1, min(3, round(nope / rope)))
    return {"qk_nope_head_dim": min(nope, ratio * new["qk_rope_head_dim"])}


def _latent_head_dims(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    rope, nope = own["qk_rope_head_dim"], own["qk_nope_head_dim"]
    if not (rules.is_count(rope) and rules.is_count(nope)):
        return {}
    sums = {rope: new["qk_rope_head_dim"], rope + nope: new["qk_rope_head_dim"] + new["qk_nope_head_dim"]}
    return {k: sums[own[k]] for k in ("head_dim", "qk_head_dim") if own.get(k) in sums}


def _state_space(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Mamba: heads x head size = inner width = expansion x hidden size, as the classes require."""
    expand = next((own[k] for k in ("mamba_expand", "expand") if rules.is_count(own.get(k))), None)
    width = new.get("hidden_size")
    if expand is None or width is None:
        return {}
    inner, changed = int(expand * width), {}
    if own.get("intermediate_size") == expand * own["hidden_size"] and "state_size" in own:
        changed["intermediate_size"] = inner
    for heads, size in _STATE_HEADS:
        if rules.is_count(own.get(heads)) and rules.is_count(own.get(size)):
            changed[size] = min(own[size], rules.HEAD_DIM)
            changed[heads] = inner // changed[size]
    if "state_size" in own and "chunk_size" in own:
        changed["chunk_size"] = min(own["chunk_size"], 8)
    return changed


_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("n_mamba_heads", "mamba_headdim"),
    ("mamba_num_heads", "mamba_head_dim"),
)


def _codebooks(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Codes as wide as the hidden size need no projection, narrower ones do."""
    width = own.get("hidden_size")
    return {
        name: new["hidden_size"] if own[name] == width else min(own[name], rules.SMALL_INTERMEDIATE)
        for name in ("codebook_dim", "vector_quantization_hidden_dimension")
        if rules.is_count(own.get(name)) and rules.is_count(width)
    }


def _positions(own: Mapping[str, Any]) -> dict[str, Any]:
    """A learned table of positions shrinks; a rotary model's length decides no shape and is kept."""
    length = own.get("max_position_embeddings")
    if not rules.is_count(length) or own.get("rope_parameters"):
        return {}
    return {"max_position_embeddings": min(length, 4 * rules.HIDDEN)}


def _image(own: Mapping[str, Any]) -> dict[str, Any]:
    """An image of 4 x 4 patches, whatever the patch is."""
    size, patch = own.get("image_size"), own.get("patch_size")
    if _is_pair(size) and _is_pair(patch):
        return {"image_size": [min(s, _PATCHES_PER_SIDE * p) for s, p in zip(size, patch, strict=True)]}
    if not (rules.is_count(size) and rules.is_count(patch)):
        return {}
    return {"image_size": min(size, _PATCHES_PER_SIDE * patch)}


def _is_pair(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(rules.is_count(v) for v in value)


def _layer_overrides(
    own: Mapping[str, Any], new: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Per-layer sizes keep their relation to the model's own: larger stays larger, smaller stays smaller."""
    return {
        layer: {k: _relative(v, own.get(k), new.get(k)) for k, v in values.items()}
        for layer, values in overrides.items()
    }


def _relative(value: Any, base: Any, new_base: Any) -> Any:
    if not (rules.is_count(value) and rules.is_count(base) and rules.is_count(new_base)):
        return value
    if value == base:
        return new_base
    if value > base:
        return min(value, new_base * max(2, min(4, value // base)))
    return max(1, min(new_base // 2, value))


def _rope(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Per-frequency lists follow the new head size."""
    changed: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(name), Mapping):
            changed[name] = _rope_mapping(own[name], _rotary_size(own, new))
    return changed


def _rotary_size(own: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    merged = {**own, **new}
    if rules.is_count(merged.get("qk_rope_head_dim")):
        return int(merged["qk_rope_head_dim"])
    if rules.is_count(merged.get("head_dim")):
        return int(merged["head_dim"])
    width = next((merged[k] for k in _WIDTHS if rules.is_count(merged.get(k))), rules.HIDDEN)
    heads = next((merged[k] for k in ("num_attention_heads", "num_heads") if rules.is_count(merged.get(k))), 1)
    return int(width // heads)


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
    """Sections in the old proportions, none empty where there is room, that sum to ``total``."""
    if sum(sections) <= total:
        return sections
    parts = [max(1, math.floor(total * part / sum(sections))) for part in sections]
    parts[0] += total - sum(parts)
    return parts
