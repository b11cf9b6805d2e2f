"""What can be added to a recipe that runs: modalities, labels, other inputs."""

from __future__ import annotations

from collections.abc import Iterable

from graftkit.twins.batches.attempts import Found, Search, furthest
from graftkit.twins.batches.candidates.named import optional, other
from graftkit.twins.batches.candidates.text import labels, texts
from graftkit.twins.batches.repairs import given, with_input, without_input
from graftkit.twins.batches.trial import Failure, Trial

# Candidates of a modality to try beside others that are already given.
_BESIDE = 60


def add_modalities(search: Search, found: Found) -> Found:
    """Feed every modality that the class takes beside those that are fed."""
    for modality, groups in search.options.items():
        if modality not in found.recipe and groups:
            failures: list[Trial] = []
            beside = search.until_it_is_the_same(groups[:_BESIDE], failures)
            tried = (search.attempt({**found.recipe, modality: group}, failures) for group in beside)
            found = first_gain(search, found, tried)
            if modality not in found.recipe:
                search.unfed[modality] = furthest(failures) or _untried()
    words = texts(search.facts)
    if words and "text" not in found.recipe:
        found = first_gain(search, found, (search.attempt({**found.recipe, "text": text}) for text in words))
    return found


def first_gain(search: Search, found: Found, candidates: Iterable[Found | None]) -> Found:
    """Return the first candidate that reaches more weights, else the first that runs, else what there is."""
    runs: Found | None = None
    for candidate in candidates:
        if candidate is not None:
            runs = runs or candidate
            if candidate.trial.weights - found.trial.weights:
                return candidate
            if len(found.trial.linears) == search.total:
                break
    return runs or found


def add_labels(search: Search, found: Found) -> Found:
    """Add the first labels from which the class computes a loss."""
    for extra in labels(search.facts, has_text="input_ids" in given(found.recipe)):
        bare = without_input(found.recipe, "decoder_input_ids") if "labels" in extra else found.recipe
        for recipe in (bare, found.recipe):
            group = "text" if "text" in recipe else "other"
            labelled = {**recipe, group: {**recipe.get(group, {}), **extra}}
            candidate = search.attempt(labelled)
            if candidate and candidate.trial.has_loss and candidate.trial.reach >= found.trial.reach:
                return candidate
    return found


def add_optional(search: Search, found: Found) -> Found:
    """Add each other input that makes the forward reach more."""
    for name in optional(search.facts, list(given(found.recipe))):
        if len(found.trial.linears) == search.total or search.is_over:
            break
        if expression := other(search.facts, name):
            candidate = search.attempt(with_input(found.recipe, name, expression))
            if candidate and candidate.trial.reach > found.trial.reach:
                found = candidate
    return found


def _untried() -> Failure:
    error = TimeoutError("the time was over before this modality was tried")
    return Failure(error, str(error))
