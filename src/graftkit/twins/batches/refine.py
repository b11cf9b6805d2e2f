"""Recipes that differ from one that runs by a single input, and may train weights that it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from graftkit.twins.batches.candidates.named import optional, other
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import Recipe
from graftkit.twins.batches.repairs import given, with_input, without_input

_ALL_ONES = re.compile(r"(?:ones|full)\((?:True, )?(?P<shape>.*)\)")
# What says which positions are padding is not mixed: it is right as it is.
_PADDING = ("attention_mask", "decoder_attention_mask", "pixel_mask", "pixel_attention_mask")
_TEXT = re.compile(r"\b(tokens|words)\(")


def variations(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Yield recipes that differ from one in a single input.

    A text that ends as texts do (some models read their sentence from that token); a mask that marks some
    positions instead of all, as global attention is meant; each optional input left out, or given.
    """
    inputs = given(recipe)
    if "input_ids" in inputs and isinstance(
        getattr(facts.model.config.get_text_config(), "eos_token_id", None), int
    ):
        ended = _TEXT.sub("ended(", inputs["input_ids"])
        if ended != inputs["input_ids"]:
            yield with_input(recipe, "input_ids", ended)
    for name, expression in inputs.items():
        marked = _ALL_ONES.fullmatch(expression)
        if marked and name.endswith("mask") and name not in _PADDING:
            yield with_input(recipe, name, f"integers(0, 2, {marked['shape']})")
    optional_names = [name for name, given_ in facts.inputs.items() if not given_.required]
    for name in inputs:
        if name in optional_names and name not in {"input_ids", "labels", "return_loss"}:
            yield without_input(recipe, name)
    for name in optional(facts, list(inputs)):
        if found := other(facts, name):
            yield with_input(recipe, name, found)
