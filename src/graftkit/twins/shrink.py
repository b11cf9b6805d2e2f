"""A configuration of any size -> a tiny one of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.families import family_of
from graftkit.twins import attention, related_fields
from graftkit.twins.field_sizes import HEAD_COUNTS, SPECIAL_IDS, TARGETS, VOCAB, is_count, is_token_field
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
    # Which stages a backbone returns: named after layers that the twin may not have. The default is the last.
    "stage_names",
    "out_features",
    "out_indices",
)


def shrink(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return a tiny copy of ``config``: widths near 64, a vocabulary of 512, one layer of every kind.

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
    fields = _merged(_shrunk(config, {}, None), overrides or {})
    try:
        small = type(config)(**fields)
    except Exception as error:
        help = "pass overrides for the fields it names: gk.twin(source, overrides={...})"
        raise no_twin(f"{type(config).__name__} refuses the shrunk values", config, error, help) from error
    small.architectures = copy.copy(config.architectures)
    return small


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


def _shrunk(config: PretrainedConfig, tokens: dict[int, int], parent: Family | None) -> dict[str, Any]:
    """Return the fields of one configuration and, recursively, of its sub-configurations.

    ``tokens`` maps ids of special tokens to the twin's, and grows. A sub-configuration of another family than its
    parent's brings its own family's overrides.
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
    new |= related_fields.tiles(new)
    return _merged(new, family.twin_overrides) if family and family is not parent else new


def _shrink_own(own: Mapping[str, Any], tokens: dict[int, int]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in own.items():
        if is_token_field(name):
            new[name] = _in_vocabulary(value, tokens)
        elif name in HEAD_COUNTS and is_count(value):
            new[name] = attention.shrunk_heads(value)
        elif name in TARGETS:
            new[name] = _sized(name, value)
    new |= attention.shrink_latent_heads(own, new)
    new |= related_fields.experts(own, new)
    new |= attention.shrink_heads(own, new)
    new |= related_fields.state_space(own, new)
    new |= related_fields.codebooks(own, new)
    new |= related_fields.positions(own) | related_fields.image(own)
    layers = shrink_layers({**own, **{k: v for k, v in new.items() if isinstance(v, list)}})
    new |= layers
    if "per_layer_config" in layers:
        new["per_layer_config"] = related_fields.layer_overrides(own, new, layers["per_layer_config"])
    new |= attention.shrink_rope(own, new)
    return new


def _sized(name: str, value: Any) -> Any:
    """Shrink a size, or a list of one size a layer whose ratios are kept."""
    target = TARGETS[name]
    if isinstance(value, list) and value and all(is_count(v) for v in value):
        smallest = min(value)
        return [min(smallest, target) * max(1, round(v / smallest)) for v in value]
    return min(value, target) if is_count(value) else value
