"""Recipes that differ a little from one that runs, and may train weights that it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from graftkit.modeling.device import cast_inputs
from graftkit.twins.batches.attempts import ROWS, Found, Search
from graftkit.twins.batches.candidates.named import STEPS, optional, other
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import MODALITIES, PLACEHOLDERS, Recipe, make_batch
from graftkit.twins.batches.repairs import given, with_input, without_input
from graftkit.twins.budget import within
from graftkit.twins.reach import without_gradient

_ALL_ONES = re.compile(r"(?:ones|full)\((?:True, )?(?P<shape>.*)\)")
# What says which positions are padding is not mixed: it is right as it is.
_PADDING = ("attention_mask", "decoder_attention_mask", "pixel_mask", "pixel_attention_mask")
_KEPT = ("input_ids", "labels", "return_loss")
_TEXT = re.compile(r"\b(tokens|ended|words)\((\d+)\)")
_LONGER = (48, 192)
_PICTURE = re.compile(r"(?P<head>normal\(.*, )(?P<height>[^,]+), (?P<width>[^,]+)\)")
_SIDES = (64, 128, 256)


def variations(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Yield recipes that differ from one in a single respect, those that are likely to train more first."""
    for vary in (_ended, _marked, _together, _longer, _larger, _without, _uncached, _with):
        yield from vary(facts, recipe)


def _ended(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """End the text as texts do: some models read their sentence from that token."""
    ids = given(recipe).get("input_ids", "")
    ended = _TEXT.sub(r"ended(\2)", ids)
    if ended != ids and isinstance(getattr(facts.model.config.get_text_config(), "eos_token_id", None), int):
        yield with_input(recipe, "input_ids", ended)


def _marked(_facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Mark some positions instead of all, as a mask for global attention is meant."""
    for name, expression in given(recipe).items():
        mask = _ALL_ONES.fullmatch(expression)
        if mask and name.endswith("mask") and name not in _PADDING:
            yield with_input(recipe, name, f"integers(0, 2, {mask['shape']})")


def _together(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Give what belongs together by its first word: ``entity_ids``, ``entity_position_ids``."""
    inputs = given(recipe)
    for first in dict.fromkeys(name.partition("_")[0] for name in optional(facts, list(inputs))):
        names = [name for name in facts.inputs if name.startswith(f"{first}_") and name not in inputs]
        group = {name: expression for name in names if (expression := other(facts, name))}
        if len(group) > 1:
            yield {**recipe, "other": {**recipe.get("other", {}), **group}}
            yield from _with_placeholders(facts, recipe, first, group)


def _with_placeholders(facts: ModelFacts, recipe: Recipe, first: str, group: dict[str, str]) -> Iterator[Recipe]:
    """Give inputs with one placeholder for each of their steps, where the configuration names its token."""
    token = next(iter(facts.fields((f"{first}_token_id", f"{first}_token_index"))), None)
    if token is not None and first in MODALITIES and first not in recipe:
        marked = {
            name: expression.replace("ones(", "full(True, ") if name.endswith("mask") else expression
            for name, expression in group.items()
        }
        yield {first: {**marked, PLACEHOLDERS: f"[{token}] * {STEPS}"}, **recipe}


def _longer(_facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Lengthen all text: more tokens choose more experts."""
    for length in _LONGER:
        longer = {
            group: {name: _TEXT.sub(rf"\1({length})", expression) for name, expression in inputs.items()}
            for group, inputs in recipe.items()
        }
        if longer != recipe:
            yield longer


def _larger(_facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Enlarge pictures: in a small one a reduced map has one position, and attention to it nothing to choose."""
    for name, expression in given(recipe).items():
        picture = _PICTURE.fullmatch(expression)
        if picture and name.startswith("pixel_values"):
            for side in _SIDES:
                yield with_input(recipe, name, f"{picture['head']}{side}, {side})")


def _without(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    for name in given(recipe):
        if name not in _KEPT and name in facts.inputs and not facts.inputs[name].required:
            yield without_input(recipe, name)


def _uncached(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    """Switch the cache off: some classes change states in place that a backward pass needs as they were."""
    if facts.takes("use_cache") and "use_cache" not in given(recipe):
        yield with_input(recipe, "use_cache", "False")


def _with(facts: ModelFacts, recipe: Recipe) -> Iterator[Recipe]:
    for name in optional(facts, list(given(recipe))):
        if expression := other(facts, name):
            yield with_input(recipe, name, expression)


def train_more(search: Search, found: Found) -> Found:
    """Change one input after the other as long as that leaves fewer linears without a gradient."""
    left = untrained(search, found)
    while left and not search.is_over:
        tried = (search.attempt(recipe) for recipe in variations(search.facts, found.recipe))
        better = ((untrained(search, one), one) for one in tried if one is not None)
        fewer = next(((number, one) for number, one in better if number < left), None)
        if fewer is None:
            break
        left, found = fewer
    return found


def untrained(search: Search, found: Found) -> int:
    """Count the linears that get no gradient: all of them where there is no backward pass."""
    import torch

    model = search.facts.model
    try:
        with within(search.share):
            batch = make_batch(found.recipe, model, ROWS, torch.Generator().manual_seed(0))
            left = without_gradient(model, cast_inputs(model, batch))
    except Exception:
        return search.total
    return sum(site.is_linear for site in left)
