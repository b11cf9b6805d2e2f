"""Where a search starts: what a forward must be given, and one or two modalities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from graftkit.twins.batches.attempts import Search
from graftkit.twins.batches.candidates.named import other, unknown
from graftkit.twins.batches.candidates.text import texts
from graftkit.twins.batches.recipe import Recipe
from graftkit.twins.batches.repairs import given, with_input

# Candidates of each of two modalities to try together.
_PAIRED = 12


def starts(search: Search) -> Iterator[Recipe]:
    """Yield recipes of text alone, of text with one other modality, of that alone, and of two others."""
    facts, words = search.facts, texts(search.facts)
    speech = facts.is_encoder_decoder and bool(search.options["audio"])
    if words and not speech:
        for text in words:
            yield with_required(search, {"text": text})
    if not words:
        yield with_required(search, {})
    fed = {modality: groups for modality, groups in search.options.items() if groups}
    orders: list[list[dict[str, str]]] = [[{}], words[:1]] if speech or not words else [words[:1], [{}]]
    for texts_ in orders:
        for modality, groups in fed.items():
            for text in texts_:
                for group in search.until_it_is_the_same(groups, search.failures):
                    yield with_required(search, {modality: group, "text": text})
    for one, other_ in itertools.combinations(fed, 2):
        for pair in itertools.product(fed[one][:_PAIRED], fed[other_][:_PAIRED]):
            yield with_required(search, {one: pair[0], other_: pair[1], "text": words[0] if words else {}})


def with_required(search: Search, recipe: Recipe) -> Recipe:
    """Return the recipe with what the forward has no default for, and a decoder's inputs."""
    facts = search.facts
    modal = {name for groups in search.options.values() for group in groups for name in group}
    for name in [i.name for i in facts.inputs.values() if i.required and i.name not in modal]:
        if name not in given(recipe) and (expression := other(facts, name) or unknown(facts, name)):
            recipe = with_input(recipe, name, expression)
    decoder = "decoder_input_ids"
    if facts.is_encoder_decoder and facts.takes(decoder) and decoder not in given(recipe):
        recipe = with_input(recipe, decoder, str(other(facts, decoder)))
    return recipe
