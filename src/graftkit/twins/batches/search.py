"""Find a recipe for a model: start from what must be given, then add what can be, where it reaches more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit.progress import Progress
from graftkit.twins.batches.attempts import Found, Search, furthest
from graftkit.twins.batches.experts import route_to_experts
from graftkit.twins.batches.extend import add_labels, add_modalities, add_optional
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.refine import train_more
from graftkit.twins.batches.starts import starts
from graftkit.twins.batches.trial import Failure, trials

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 25.0
_EXTENSIONS = (add_modalities, add_labels, add_optional, route_to_experts, train_more)


class NoRecipe(Exception):  # noqa: N818 (says what there is not)
    """No candidate runs.

    Attributes:
        failure: of the candidate that came furthest; None where the forward takes nothing that has candidates.
    """

    def __init__(self, failure: Failure | None) -> None:
        self.failure = failure
        super().__init__(failure.message if failure else "its forward takes nothing that a batch is made of")


def find_recipe(
    model: PreTrainedModel,
    *,
    seconds: float = SECONDS,
    on_progress: Callable[[Progress], None] | None = None,
) -> Found:
    """Return the recipe that runs and reaches the most linears, of those that the search tries.

    Args:
        model: small, with weights: every candidate is run.
        seconds: of computing, after which the best until then is returned: other processes do not count.
        on_progress: called before each trial, with the number of linears that are reached.

    Raises:
        NoRecipe: none runs.
    """
    with trials(model) as watched:
        search = Search(ModelFacts(model), watched, time.thread_time() + seconds, on_progress)
        found = next((one for recipe in starts(search) if (one := search.attempt(recipe))), None)
        if found is None:
            raise NoRecipe(furthest(search.failures))
        for extend in _EXTENSIONS:
            found = extend(search, found)
    return replace(found, unfed={m: f for m, f in search.unfed.items() if m not in found.recipe})
