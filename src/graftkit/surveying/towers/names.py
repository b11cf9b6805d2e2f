"""What names say about a module's tower: the last resort, where neither the model nor its structure tells."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# Whole words, as snake_case and CamelCase write them; the first tower that has one wins.
_WORDS = {
    "audio": "audio speech sound acoustic wave waveform wav mel spectrogram",
    "vision": "vision visual image images img imgs pixel pixels video videos vit",
    "projector": "projector projection connector adapter adaptor resampler perceiver qformer",
    "language": "text language llm lm",
}
_TOWER_OF_WORD = {word: tower for tower, words in _WORDS.items() for word in words.split()}

# What a forward calls its inputs, in transformers and in code written by hand.
_INPUTS = {
    "vision": "pixel_values pixel_values_videos pixels image images img imgs video videos frames",
    "audio": "input_features input_values audio audios waveform waveforms wav speech mel mels spectrogram",
    "language": "input_ids decoder_input_ids token_ids tokens text_tokens text_ids ids",
}
TOWER_OF_INPUT = {name: tower for tower, names in _INPUTS.items() for name in names.split()}

# Words of arguments that come with text, or choose what a forward returns.
_BESIDE_TEXT = (
    "input inputs ids id token tokens idx embeds mask masks attention position positions type types label labels"
    " target targets cache past use output outputs return logits to keep head kwargs args start end weights loss"
    " causal num items in batch encoder decoder hidden states next sentence seq lens length lengths src tgt source"
)
_TEXT_WORDS = frozenset(_BESIDE_TEXT.split())
# What may be anything, or several things.
_ANYTHING = frozenset(("batch", "data", "example", "input", "inputs", "sample"))
# An input of these words was computed elsewhere, from whatever it may be.
_PRECOMPUTED = frozenset(("feature", "features", "feat", "feats", "embedding", "embeddings", "latents", "signal"))


def words_of(name: str) -> list[str]:
    """Return the lower-case words of a snake_case or CamelCase name: "CLIPVisionTower" -> clip, vision, tower."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+", " ", name)
    return spaced.lower().split()


def tower_named(*names: str) -> str | None:
    """Return the tower that the first telling name says, or None."""
    for name in names:
        towers = {_TOWER_OF_WORD[word] for word in words_of(name) if word in _TOWER_OF_WORD}
        if towers:
            return next(tower for tower in _WORDS if tower in towers)
    return None


def comes_with_text(argument: str) -> bool:
    """Check whether a forward that takes only text has an argument of this name."""
    return TOWER_OF_INPUT.get(argument) == "language" or _TEXT_WORDS.issuperset(words_of(argument))


def may_be_anything(arguments: Collection[str]) -> bool:
    """Check whether a forward's arguments say nothing of what it takes: one for all, or none that has a name."""
    return _ANYTHING.issuperset(arguments)


def is_precomputed(argument: str) -> bool:
    """Check whether an argument's name says that another model computed it."""
    return not _PRECOMPUTED.isdisjoint(words_of(argument))


def is_text(argument: str) -> bool:
    """Check whether an argument is tokens."""
    return TOWER_OF_INPUT.get(argument) == "language" or not {"ids", "idx", "tokens"}.isdisjoint(
        words_of(argument)
    )


def modalities_named(arguments: Iterable[str]) -> frozenset[str]:
    """Return the towers whose input is among a forward's arguments."""
    return frozenset(TOWER_OF_INPUT[name] for name in arguments if name in TOWER_OF_INPUT)
