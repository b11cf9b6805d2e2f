"""Candidates for audio: spectrograms in both orders of their axes, and raw waveforms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from graftkit.twins.batches.candidates.placeholders import with_placeholders
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.sizes.field_sizes import is_count

_AUDIO = ("audio", "speech", "sound", "encoder")
_TOKENS = ("audio_token_id", "audio_token_index", "speech_token_id", "sound_token_id")
_SPECTROGRAMS = ("input_features", "audio_mel", "audio_features", "input_audio_embeds")
_WAVES = ("input_values", "audio_values", "input_audio")
_MASKS = (
    "feature_attention_mask",
    "input_features_mask",
    "audio_mel_mask",
    "padding_mask",
    "input_values_mask",
    "audio_attention_mask",
)
# Which masks are of a spectrogram, where there is a wave beside it.
_OF_FEATURES = re.compile(r"feature|mel")
_BINS = (
    "num_mel_bins",
    "n_mels",
    "mel_bins",
    "input_feat_size",
    "input_feat_per_channel",
    "feature_size",
    "mel_dim",
    "num_mel_channels",
    "feature_projection_input_dim",
    "input_dim",
    "input_size",
    "feat_in",
    "input_feat_dim",
    "semantic_input_dim",
    "audio_dim",
)
# Strided extractors of waveforms reduce by 320 and more: the first makes about twenty frames of such.
_SAMPLES = ("6400", "7680", "19200", "38400")
_FRAMES = ("64", "100", "128", "200", "400", "480", "1024")


def audios(facts: ModelFacts) -> list[dict[str, str]]:
    """Return groups of inputs for one clip a row."""
    if facts.lacks("audio"):
        return []
    spectrogram = next((name for name in _SPECTROGRAMS if facts.takes(name)), None)
    wave = next((name for name in _WAVES if facts.takes(name)), None)
    groups: list[dict[str, str]] = []
    if spectrogram and wave and any(facts.inputs[name].required for name in (spectrogram, wave)):
        groups += _pairs(facts, spectrogram, wave)
    if wave:
        groups += _waves(facts, wave)
    if spectrogram:
        groups += _spectrograms(facts, spectrogram)
    if wave:
        groups += _spectrograms(facts, wave)
    return with_placeholders(facts, groups, _TOKENS)


def _pairs(facts: ModelFacts, spectrogram: str, wave: str) -> Iterator[dict[str, str]]:
    """Yield a spectrogram beside the wave that it is of, each with the masks of its own length."""
    hops = facts.fields(("encoder_hop_length", "hop_length"), _AUDIO)
    of_features = [mask for mask in _masks(facts) if _OF_FEATURES.search(mask)]
    of_waves = [mask for mask in _masks(facts) if mask not in of_features]
    for samples in (*(f"{{frames}} * {hop}" for hop in hops), *_SAMPLES[:2]):
        for heard in _wave_shapes(facts, wave, samples):
            for seen, frames in _spectrogram_shapes(facts, spectrogram):
                length = samples.format(frames=frames)
                features = _masked(facts, spectrogram, seen, frames, of_features)
                waves = _masked(facts, wave, heard.format(frames=frames), length, of_waves)
                yield from ({**one, **other} for one, other in zip(features, waves, strict=False))


def _waves(facts: ModelFacts, name: str) -> Iterator[dict[str, str]]:
    for samples in _SAMPLES:
        for shape in _wave_shapes(facts, name, samples):
            yield from _masked(facts, name, shape, samples, _masks(facts))


def _wave_shapes(facts: ModelFacts, name: str, samples: str) -> list[str]:
    channels = facts.count(("audio_channels", "channels", "num_channels"), 1, _AUDIO)
    shapes = [f"B, {samples}", f"B, {channels}, {samples}"]
    return shapes[::-1] if len(facts.inputs[name].shape) == 3 else shapes


def _spectrograms(facts: ModelFacts, name: str) -> Iterator[dict[str, str]]:
    for shape, frames in _spectrogram_shapes(facts, name):
        yield from _masked(facts, name, shape, frames, _masks(facts))


def _spectrogram_shapes(facts: ModelFacts, name: str) -> Iterator[tuple[str, str]]:
    """Yield shapes, and how many frames each has."""
    shapes = ["B, {bins}, {frames}", "B, {frames}, {bins}", "B, 1, {frames}, {bins}", "B, 1, {bins}, {frames}"]
    documented = facts.inputs[name].shape
    positions = facts.fields(("max_source_positions",), _AUDIO)
    time_first = len(documented) > 1 and any(
        word in documented[1] for word in ("sequence", "frames", "time", "length")
    )
    if time_first or not (documented or positions):
        shapes[0], shapes[1] = shapes[1], shapes[0]
    if len(documented) == 4:
        shapes = shapes[2:] + shapes[:2]
    lengths = [f"2 * {field}" for field in positions] + facts.fields(("max_length",), ("audio",))
    for frames in (*lengths, *_FRAMES):
        for bins in _bins(facts):
            for shape in shapes:
                yield shape.format(bins=bins, frames=frames), frames


def _bins(facts: ModelFacts) -> list[str]:
    stated = [field for field in facts.fields(_BINS, _AUDIO) if is_count(facts.value(field))]
    return [*stated[:3], "80", "128", "160"]


def _masks(facts: ModelFacts) -> list[str]:
    masks = [mask for mask in _MASKS if facts.takes(mask)]
    if facts.takes("attention_mask") and not facts.takes("input_ids"):
        masks.append("attention_mask")
    return masks


def _masked(
    facts: ModelFacts, name: str, shape: str, length: str, masks: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield the input with masks of its length where there are any, and without those that it can go without."""
    group = {name: f"normal({shape})"}
    if facts.takes("is_longer"):
        group["is_longer"] = "full(False, B, 1)"
    if facts.takes("input_values_cutoffs"):
        group["input_values_cutoffs"] = f"rows({length})"
    if masks:
        yield group | {mask: _mask(facts, mask, length) for mask in masks}
    if not any(facts.inputs[mask].required for mask in masks):
        yield group


def _mask(facts: ModelFacts, name: str, length: str) -> str:
    if name == "audio_mel_mask":
        return f"full(False, B, {length})"  # true where there is no sound
    axes = facts.inputs[name].shape
    shape = f"B, 1, {length}" if len(axes) == 3 else f"B, {length}"
    return f"full(True, {shape})" if facts.inputs[name].kind == "bool" else f"ones({shape})"
