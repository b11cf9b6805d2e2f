"""A text that is long enough for every expert to get a token."""

from __future__ import annotations

from graftkit.twins.batches.attempts import Found, Search
from graftkit.twins.batches.repairs import given, with_input
from graftkit.twins.batches.trial import Trial, is_linear

_MORE_TOKENS = (48, 192)
_OTHER_SEEDS = (1,)


def route_to_experts(search: Search, found: Found) -> Found:
    """Lengthen the text until every expert gets a token, with more than one seed."""
    ids = given(found.recipe).get("input_ids")
    if ids is None or all_routed(search, found):
        return found
    for length in _MORE_TOKENS:
        recipe = with_input(found.recipe, "input_ids", ids.replace("12", str(length), 1))
        candidate = search.attempt(recipe)
        if candidate and candidate.trial.reach >= found.trial.reach:
            found = candidate
            if all_routed(search, found):
                break
    return found


def all_routed(search: Search, found: Found) -> bool:
    """Check whether every expert gets a token: of stacked ones by the router's choices, of lists by calls."""
    seeds = [found.trial, *(search.run(found.recipe, seed) for seed in _OTHER_SEEDS)]
    return all(not trial.unrouted and not silent_experts(search, trial) for trial in seeds)


def silent_experts(search: Search, trial: Trial) -> frozenset[str]:
    """Return linears that were not called, in a list of modules of which another one was."""
    every = {path for path, module in search.facts.model.named_modules() if is_linear(module)}
    called = {_unnumbered(path) for path in trial.linears}
    return frozenset(path for path in every - trial.linears if "experts." in path and _unnumbered(path) in called)


def _unnumbered(path: str) -> str:
    head, _, tail = path.rpartition("experts.")
    return f"{head}experts.*.{tail.partition('.')[2]}"
