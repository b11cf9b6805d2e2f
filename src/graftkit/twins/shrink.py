"""A configuration of any size -> a tiny one of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.families import family_of
from graftkit.twins.sizes import attention, pictures, related_fields
from graftkit.twins.sizes.field_sizes import (
    HEAD_COUNTS,
    LAYER_COUNTS,
    REPEATS,
    SPECIAL_IDS,
    TARGETS,
    VOCAB,
    is_count,
    is_token_field,
)
from graftkit.twins.sizes.kept import Kept
from graftkit.twins.sizes.layers import shrink_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from graftkit.families import Family

# Where the weights came from and how they were stored.
_NOT_ARCHITECTURE = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "name_or_path",
    "_name_or_path",
)
_DROPPED = (
    *_NOT_ARCHITECTURE,
    "quantization_config",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "compression_config",
)
# Which stages a backbone returns: named after layers that the twin may not have. The default is the last.
_STAGES = ("stage_names", "out_features", "out_indices")

_COUNTS = REPEATS | set(LAYER_COUNTS)
_FEATURE_TOKENS = tuple(f"{kind}_token_{end}" for kind in ("image", "audio", "video") for end in ("id", "index"))
# In this order: each reads what those before it changed.
_RULES = (
    related_fields.listed_widths,
    attention.shrink_latent_heads,
    related_fields.experts,
    related_fields.unset,
    attention.shrink_heads,
    attention.shrink_heads_of_stages,
    related_fields.state_space,
    related_fields.codebooks,
    related_fields.embeddings,
    related_fields.as_wide,
    related_fields.boxes,
    related_fields.positions,
    related_fields.stages,
    related_fields.scaled_stages,
    related_fields.image,
    pictures.clips,
    pictures.framed,
)
# These read the parts as well.
_RULES_OF_PARTS = (
    related_fields.joined_widths,
    related_fields.feature_maps,
    related_fields.scaled_widths,
    pictures.pictures_of_parts,
    pictures.read_layers,
)


def shrink(
    config: PretrainedConfig, overrides: Mapping[str, Any] | None = None, *, kept: Iterable[str] = ()
) -> PretrainedConfig:
    """Return a tiny copy of ``config``: widths near 64, a vocabulary of 512, one layer of every kind.

    Kept as they are: every kind of layer (attention pattern, dense and sparse, with and without shared
    keys and values, per-layer overrides), every tower, tied weights, whether attention is multi-head, grouped
    or multi-query, experts with top-k below their number, flags. A sub-configuration that is present stays
    present and one that is absent stays absent. Special tokens stay distinct and inside the vocabulary.

    Args:
        config: any transformers configuration. It is not changed.
        overrides: values the result must have; nested mappings address sub-configurations. They win over
            the family's overrides, which win over the generic rules.
        kept: what is left at full size, as patterns over its fields (see :mod:`graftkit.twins.sizes.kept`).

    Raises:
        BuildError: code ``twin``, where the configuration's class refuses the values.
    """
    fields = _fields(config, overrides, kept)
    try:
        small = type(config)(**fields)
    except Exception as error:
        help = "pass overrides for the fields it names: gk.twin(source, overrides={...})"
        raise no_twin(f"{type(config).__name__} refuses the shrunk values", config, error, help) from error
    small.architectures = copy.copy(config.architectures)
    return small


def changed_fields(
    config: PretrainedConfig, overrides: Mapping[str, Any] | None = None, *, kept: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return what ``shrink`` changes, or drops: dotted path of a field -> its value, and the value in the twin.

    A field that is dropped has None. Whether the configuration's class takes the values is not asked.
    """
    return dict(config_differences(config.to_dict(), _fields(config, overrides, kept)))


def config_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], part: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the dotted path of each field of ``before`` that ``after`` has not, or has otherwise, and both.

    Args:
        before, after: fields of two configurations, as ``to_dict`` gives them.
        part: dotted path of the part that they are of, with a dot behind it.
    """
    for name, value in before.items():
        small = after.get(name)
        if isinstance(value, Mapping) and isinstance(small, Mapping) and "model_type" in value:
            yield from config_differences(value, small, f"{part}{name}.")
        elif value != small and name not in _NOT_ARCHITECTURE:
            yield f"{part}{name}", (value, small)


def _fields(config: PretrainedConfig, overrides: Mapping[str, Any] | None, kept: Iterable[str]) -> dict[str, Any]:
    all_kept = Kept.of(kept)
    own, fields = config.to_dict(), _shrunk(config, {}, None, all_kept)
    for alike in (related_fields.shared_heads, related_fields.shared_pictures):
        fields = _merged(fields, alike(own, fields))
    fields = _merged(fields, _not_kept(related_fields.as_wide_as_others(own, fields), all_kept))
    return _merged(fields, overrides or {})


def _not_kept(widths: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return widths, of parts too, but those that are kept."""
    own = {} if kept.widths else kept.without(widths)
    return own | {
        name: _not_kept(value, kept.inside(name)) for name, value in widths.items() if isinstance(value, Mapping)
    }


def no_twin(what: str, config: PretrainedConfig, why: Exception | str, help: str) -> BuildError:
    """Return the error that says why there is no twin of a configuration."""
    reason = why if isinstance(why, str) else f"{type(why).__name__}: {why}".strip()
    return BuildError(f"no twin: {what}", where=config.model_type, why=reason, help=help, code="twin")


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


def _in_vocabulary(value: Any, known: dict[int, int]) -> Any:
    """Map ids of special tokens into the twin's vocabulary; the same id always maps to the same one."""
    if isinstance(value, list):
        return [_in_vocabulary(item, known) for item in value]
    if not is_count(value) or value < SPECIAL_IDS:
        return value
    return known.setdefault(value, SPECIAL_IDS + len(known) % (VOCAB - SPECIAL_IDS))


def _placeholders(fields: Mapping[str, Any], tokens: dict[int, int]) -> dict[str, int]:
    """Set the tokens that stand for features where a default configuration leaves them open."""
    parts = [name for name, value in fields.items() if isinstance(value, Mapping) and "model_type" in value]
    unset = [name for name in _FEATURE_TOKENS if len(parts) > 1 and name in fields and fields[name] is None]
    return {name: tokens.setdefault(-1 - at, SPECIAL_IDS + len(tokens)) for at, name in enumerate(unset)}


def _shrunk(config: PretrainedConfig, tokens: dict[int, int], parent: Family | None, kept: Kept) -> dict[str, Any]:
    """Return the fields of one configuration and, recursively, of its sub-configurations.

    ``tokens`` maps ids of special tokens to the twin's, and grows. A sub-configuration of another family than its
    parent's brings its own family's overrides.
    """
    fields = config.to_dict()
    family = family_of(config.model_type)
    subs = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {k: v for k, v in fields.items() if k not in subs and k not in _DROPPED}
    new = own | _shrink_own(own, tokens, kept)
    if any(new[name] != own[name] for name in LAYER_COUNTS if name in own):
        new = {name: value for name, value in new.items() if name not in _STAGES}
    for name, sub in subs.items():
        if hasattr(sub, "to_dict"):
            new[name] = _shrunk(sub, tokens, family, kept.inside(name))
        else:
            new[name] = copy.deepcopy(fields.get(name))
    new |= related_fields.tiles(new) | kept.without(related_fields.merged_widths(fields, new))
    new |= _placeholders(new, tokens)
    for rule in () if kept.widths else _RULES_OF_PARTS:
        new |= kept.without(rule(fields, new))
    if family is None or family is parent or kept.everything:
        return new
    return _merged(new, _still_needed(family.twin_overrides, kept))


def _still_needed(overrides: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return a family's overrides but those of kept fields: its widths go with the generic ones."""
    needed: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            needed[name] = _still_needed(value, kept.inside(name))
        elif not kept.has(name) and not (kept.widths and is_count(value) and name not in _COUNTS):
            needed[name] = value
    return needed


def _shrink_own(own: Mapping[str, Any], tokens: dict[int, int], kept: Kept) -> dict[str, Any]:
    """Return the fields of one configuration, without its parts, that change."""
    new = {name: _in_vocabulary(value, tokens) for name, value in own.items() if is_token_field(name)}
    new |= {
        name: _sized(name, value) for name, value in own.items() if name in (REPEATS if kept.widths else TARGETS)
    }
    new |= kept.of_fields(own)
    for rule in (related_fields.experts, related_fields.unset) if kept.widths else _RULES:
        new |= kept.without(rule(own, new))
    new |= _fewer_layers({**own, **{k: v for k, v in new.items() if isinstance(v, list)}}, kept)
    overrides = new.get("per_layer_config", own.get("per_layer_config"))
    if isinstance(overrides, Mapping) and not kept.widths:
        new["per_layer_config"] = related_fields.layer_overrides(own, new, overrides)
        new |= kept.without(attention.shrink_latent_heads_of_layers(own, new))
    if not kept.widths:
        new |= kept.without(related_fields.widths_of_listed_layers(own, new))
    return new | kept.without(attention.shrink_rope(own, new))


def _fewer_layers(own: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    changed = {} if kept.everything else shrink_layers(own, first=kept.first_layers)
    return {} if any(kept.has(name) for name in changed) else changed


def _sized(name: str, value: Any) -> Any:
    """Shrink a size, or a list of one size a layer whose ratios are kept."""
    if name in HEAD_COUNTS and is_count(value):
        return attention.shrunk_heads(value)
    target = TARGETS[name]
    if isinstance(value, list) and value and all(is_count(v) for v in value):
        smallest = min(value)
        return [min(smallest, target) * max(1, round(v / smallest)) for v in value]
    return min(value, target) if is_count(value) else value
