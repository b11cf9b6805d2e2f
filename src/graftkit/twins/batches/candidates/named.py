"""Candidates for all other inputs: by a few names that many classes share, else by documented shape and type."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graftkit.twins.batches.candidates.images import CHANNELS, VISION, image_sizes
from graftkit.twins.batches.candidates.placeholders import MARKS
from graftkit.twins.batches.facts import Input, ModelFacts

# Not inputs but results, caches, or another form of an input that is already there.
_NEVER = re.compile(
    r"past_key_values|cache|inputs_embeds|position_ids|encoder_outputs|_states_cache|output_|return_|labels|"
    r"mm_encoder_outputs|image_embeddings|vision_embeds|text_embeds|image_embeds$|query_length|head_mask|kwargs"
)
_STEPS = 6
_TIMES = ("num_time_features",)
# The size of an axis where nothing shows it.
STEPS = 4
_ENCODER_WIDTHS = ("encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
_ACTIONS = ("max_action_dim", "act_dim", "action_dim")


def other(facts: ModelFacts, name: str) -> str | None:
    """Return an expression for an input, or None where nothing shows what it is."""
    return _by_name(facts, name) or _by_shape(facts, facts.inputs[name])


def unknown(facts: ModelFacts, name: str) -> str | None:
    """Return a first guess for an input of an unknown kind: how it then fails shows its widths."""
    given = facts.inputs[name]
    if given.kind == "number":
        return "1"
    undocumented = given.kind in ("", "float") and not given.shape
    return f"normal(B, {facts.width}, {_STEPS})" if undocumented else None


def optional(facts: ModelFacts, given: Sequence[str]) -> list[str]:
    """Return the inputs that a batch may have beside those that are given."""
    return [name for name in facts.inputs if name not in given and not _NEVER.search(name)]


def _by_name(facts: ModelFacts, name: str) -> str | None:
    count = facts.count
    channels = count(("num_input_channels",), 0)
    past, future = count(("context_length",), 64), count(("prediction_length", "horizon_length"), 8)
    if lags := facts.fields(("lags_sequence",)):
        past = f"{past} + largest({lags[0]})"
    steps = past if name.startswith("past") else future
    if name in ("past_values", "future_values"):
        return f"normal(B, {steps}{', ' + channels if channels != '0' else ''})"
    height, width = image_sizes(facts)[0]
    pixels = f"B, {count(CHANNELS, 3, VISION)}, {height}, {width}"
    known = {
        "token_type_ids": "full(0, B, T)",
        "attention_mask": "ones(B, T)",
        "decoder_attention_mask": "ones(B, 4)",
        "decoder_input_ids": "words(4)",
        "bbox": f"boxes(T, {count(('max_2d_position_embeddings',), 128)})",
        "pixel_mask": f"ones(B, {height}, {width})",
        "pixel_attention_mask": f"ones(B, {height}, {width})",
        "prompt_pixel_values": f"normal({pixels})",
        "prompt_masks": f"normal({pixels})",
        "high_res_pixel_values": f"normal({pixels})",
        "cross_attention_mask": "ones(B, T, 1, 1)",
        "image_attention_mask": "ones(B, T, 1)",
        "input_points": "uniform(B, 1, 2, 2)",
        "input_labels": "ones(B, 1, 2)",
        "input_boxes": "uniform(B, 1, 4)",
        "past_values_padding": f"full(0.0, B, {past})",
        "past_observed_mask": f"ones(B, {past})",
        "past_time_features": f"normal(B, {past}, {count(_TIMES, 0)})",
        "future_time_features": f"normal(B, {future}, {count(_TIMES, 0)})",
        "freq": "full(0, B, 1)",
        "timestep": "uniform(B)",
        "timesteps": f"counting({_STEPS})",
        "lang_ids": f"full(0, B, {'T' if len(facts.inputs[name].shape) == 2 else '1'})",
        "encoder_hidden_states": f"normal(B, 8, {count(_ENCODER_WIDTHS, 64)})",
        # States of several layers of another model, side by side.
        "context_hidden_states": f"normal(B, 8, {facts.width} * {_target_layers(facts)})",
        "encoder_attention_mask": "ones(B, 8)",
        MARKS: "types()",
        "qformer_input_ids": "words(6)",
        "qformer_attention_mask": "ones(B, 6)",
        "query_embeds": f"normal(B, 4, {facts.width})",
        "states": f"normal(B, {_STEPS}, {count(('state_dim',), 8)})",
        "state": f"normal(B, {count(('max_state_dim', 'state_dim'), 8)})",
        "actions": f"normal(B, {count(('chunk_size',), _STEPS)}, {count(_ACTIONS, 4)})",
        "rewards": f"normal(B, {_STEPS}, 1)",
        "returns_to_go": f"normal(B, {_STEPS}, 1)",
    }
    if name in known:
        return known[name]
    # Another text than the model's: of proteins, of documents.
    if name.endswith("_input_ids"):
        return "integers(3, 8, B, 8)" if not facts.inputs[name].shape else None
    return "ones(B, 8)" if name.endswith("_attention_mask") and not facts.inputs[name].shape else None


def _by_shape(facts: ModelFacts, given: Input) -> str | None:
    if not given.shape or given.kind in ("", "flag", "number"):
        return None
    axes = [_axis(facts, given, axis) for axis in given.shape]
    if None in axes:
        return None
    shape = ", ".join(axis for axis in axes if axis)
    if given.name.endswith("mask"):
        return f"full(True, {shape})" if given.kind == "bool" else f"ones({shape})"
    whole = given.kind == "int" or re.search(r"_(ids|seq|idx|index)$", given.name)
    return (
        f"integers(0, 2, {shape})" if whole else f"{'full(True, ' if given.kind == 'bool' else 'normal('}{shape})"
    )


def _axis(facts: ModelFacts, given: Input, axis: str) -> str | None:
    """Return the size of a documented axis: a number, a field of the configuration, or a usual name."""
    axis = axis.removeprefix("config.").strip()
    if axis.isdigit():
        return axis
    if re.fullmatch(r"batch(_size)?|bs|num_images|num_videos|n_images", axis):
        return "B"
    if re.fullmatch(r"(text_|token_)?(sequence|seq)_?(length|len)|seqlen", axis):
        return "T"
    if field := facts.fields((axis,), VISION if "pixel" in given.name else ()):
        return field[0]
    usual = {
        "hidden_size": facts.width,
        "num_channels": facts.count(CHANNELS, 3, VISION),
        "episode_length": str(_STEPS),
        **dict.fromkeys(("height", "image_size", "frame_size"), image_sizes(facts)[0][0]),
        "width": image_sizes(facts)[0][1],
    }
    return usual.get(axis, str(STEPS) if re.fullmatch(r"\w+", axis) else None)


def _target_layers(facts: ModelFacts) -> str:
    """Return of how many layers of another model the states are taken."""
    listed = facts.fields(("target_layer_ids",))
    return f"number({listed[0]})" if listed else facts.count(("num_context_layers",), 1)
