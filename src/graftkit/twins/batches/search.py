"""Find a recipe for a model: start from what must be given, then add what can be, where it reaches more."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graftkit.modeling.device import cast_inputs
from graftkit.progress import Progress
from graftkit.twins.batches.candidates.audio import audios
from graftkit.twins.batches.candidates.images import images
from graftkit.twins.batches.candidates.named import optional, other
from graftkit.twins.batches.candidates.text import labels, texts
from graftkit.twins.batches.candidates.videos import videos
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import Recipe, make_batch
from graftkit.twins.batches.refine import variations
from graftkit.twins.batches.repairs import given, repaired, with_input, without_input
from graftkit.twins.batches.trial import Failure, Trial, Trials, is_linear, trials
from graftkit.twins.reach import without_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 2
SECONDS = 25.0
_REPAIRS = 7
# Candidates of a modality to try beside others that are already given.
_BESIDE = 60
_MORE_TOKENS = (48, 192)
_SEEDS = (0, 1)
# So many candidates that fail in the same way: the next will too.
_SAME = 4


@dataclass(frozen=True)
class Found:
    """A recipe that runs, and what one forward of it reached.

    Attributes:
        recipe: it ran.
        trial: that forward pass.
        unfed: modalities that the forward takes and of which no candidate ran, with the best one's failure.
    """

    recipe: Recipe
    trial: Trial
    unfed: Mapping[str, Failure] = field(default_factory=dict)


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
        search = _Search(ModelFacts(model), watched, time.thread_time() + seconds, on_progress)
        found = search.start()
        if found is None:
            raise NoRecipe(_furthest(search.failures))
        for extend in (
            search.add_modalities,
            search.add_labels,
            search.add_optional,
            search.route_to_experts,
            search.train_more,
        ):
            found = extend(found)
    return replace(found, unfed={m: f for m, f in search.unfed.items() if m not in found.recipe})


@dataclass
class _Search:
    facts: ModelFacts
    trials: Trials
    deadline: float
    on_progress: Callable[[Progress], None] | None
    failures: list[Trial] = field(default_factory=list)
    seen: Counter[tuple[object, ...]] = field(default_factory=Counter)
    best: int = 0
    tried: set[str] = field(default_factory=set)
    unfed: dict[str, Failure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = sum(is_linear(module) for module in self.facts.model.modules())
        self.options = {
            "image": images(self.facts),
            "audio": audios(self.facts),
            "video": videos(self.facts),
        }

    @property
    def is_over(self) -> bool:
        return time.thread_time() > self.deadline

    # Trials

    def attempt(self, recipe: Recipe, failures: list[Trial] | None = None) -> Found | None:
        """Run a recipe, repaired as often as that helps; trials that failed are added to ``failures``."""
        for _ in range(_REPAIRS):
            key = repr(sorted((g, sorted(i.items())) for g, i in recipe.items() if i))
            if self.is_over or key in self.tried:
                return None
            self.tried.add(key)
            trial = self.run(recipe)
            if trial.failure is None:
                self.best = max(self.best, len(trial.linears))
                return Found({group: inputs for group, inputs in recipe.items() if inputs}, trial)
            (self.failures if failures is None else failures).append(trial)
            changed = repaired(self.facts, recipe, trial.failure)
            if changed is None:
                self.seen[trial.failure.place] += 1
                return None
            recipe = changed
        return None

    def run(self, recipe: Recipe, seed: int = 0, rows: int = _ROWS) -> Trial:
        """Run a recipe once."""
        import torch

        if self.on_progress:
            self.on_progress(Progress("look for a batch", self.best, self.total))
        generator = torch.Generator().manual_seed(seed)
        return self.trials.run(lambda: make_batch(recipe, self.facts.model, rows, generator))

    # The first recipe that runs

    def start(self) -> Found | None:
        """Return the first recipe that runs, or None."""
        return next((found for recipe in self.starts() if (found := self.attempt(recipe))), None)

    def starts(self) -> Iterator[Recipe]:
        """Yield recipes of text alone, of text with one other modality, of that alone, and of two others."""
        facts, words = self.facts, texts(self.facts)
        speech = facts.is_encoder_decoder and bool(self.options["audio"])
        if words and not speech:
            for text in words:
                yield self.with_required({"text": text})
        if not words:
            yield self.with_required({})
        fed = {modality: groups for modality, groups in self.options.items() if groups}
        orders: list[list[dict[str, str]]] = [[{}], words[:1]] if speech or not words else [words[:1], [{}]]
        for texts_ in orders:
            for modality, groups in fed.items():
                for text in texts_:
                    for group in self.until_it_is_the_same(groups, self.failures):
                        yield self.with_required({modality: group, "text": text})
        for one, other_ in itertools.combinations(fed, 2):
            for pair in itertools.product(fed[one][:12], fed[other_][:12]):
                yield self.with_required({one: pair[0], other_: pair[1], "text": words[0] if words else {}})

    def with_required(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what the forward has no default for, and a decoder's inputs."""
        facts = self.facts
        modal = {name for groups in self.options.values() for group in groups for name in group}
        for name in [i.name for i in facts.inputs.values() if i.required and i.name not in modal]:
            if name not in given(recipe) and (expression := other(facts, name)):
                recipe = with_input(recipe, name, expression)
        decoder = "decoder_input_ids"
        if facts.is_encoder_decoder and facts.takes(decoder) and decoder not in given(recipe):
            recipe = with_input(recipe, decoder, str(other(facts, decoder)))
        return recipe

    # What can be added to it

    def add_modalities(self, found: Found) -> Found:
        """Feed every modality that the class takes beside those that are fed."""
        for modality, groups in self.options.items():
            if modality not in found.recipe and groups:
                failures: list[Trial] = []
                beside = self.until_it_is_the_same(groups[:_BESIDE], failures)
                tried = (self.attempt({**found.recipe, modality: group}, failures) for group in beside)
                found = self.first_gain(found, tried)
                if modality not in found.recipe:
                    self.unfed[modality] = _furthest(failures) or _untried()
        words = texts(self.facts)
        if words and "text" not in found.recipe:
            found = self.first_gain(found, (self.attempt({**found.recipe, "text": text}) for text in words))
        return found

    def until_it_is_the_same(
        self, groups: Iterable[dict[str, str]], failures: list[Trial]
    ) -> Iterator[dict[str, str]]:
        """Yield candidates while their failures differ: one that all have in common is not theirs."""
        for group in groups:
            yield group
            failure = failures[-1].failure if failures else None
            if failure and failure.module and self.seen[failure.place] >= _SAME:
                return

    def first_gain(self, found: Found, candidates: Iterable[Found | None]) -> Found:
        """Return the first candidate that reaches more weights, else the first that runs, else what there is."""
        runs: Found | None = None
        for candidate in candidates:
            if candidate is not None:
                runs = runs or candidate
                if candidate.trial.weights - found.trial.weights:
                    return candidate
                if len(found.trial.linears) == self.total:
                    break
        return runs or found

    def add_labels(self, found: Found) -> Found:
        """Add the first labels from which the class computes a loss."""
        for extra in labels(self.facts, has_text="input_ids" in given(found.recipe)):
            bare = without_input(found.recipe, "decoder_input_ids") if "labels" in extra else found.recipe
            for recipe in (bare, found.recipe):
                group = "text" if "text" in recipe else "other"
                labelled = {**recipe, group: {**recipe.get(group, {}), **extra}}
                candidate = self.attempt(labelled)
                if candidate and candidate.trial.has_loss and candidate.trial.reach >= found.trial.reach:
                    return candidate
        return found

    def add_optional(self, found: Found) -> Found:
        """Add each other input that makes the forward reach more."""
        for name in optional(self.facts, list(given(found.recipe))):
            if len(found.trial.linears) == self.total or self.is_over:
                break
            if expression := other(self.facts, name):
                candidate = self.attempt(with_input(found.recipe, name, expression))
                if candidate and candidate.trial.reach > found.trial.reach:
                    found = candidate
        return found

    def route_to_experts(self, found: Found) -> Found:
        """Lengthen the text until every expert gets a token, with more than one seed."""
        if self.all_routed(found):
            return found
        ids = given(found.recipe).get("input_ids", "")
        for length in _MORE_TOKENS:
            recipe = with_input(found.recipe, "input_ids", ids.replace("12", str(length), 1))
            candidate = self.attempt(recipe)
            if candidate and candidate.trial.reach >= found.trial.reach:
                found = candidate
                if self.all_routed(found):
                    break
        return found

    def all_routed(self, found: Found) -> bool:
        """Check whether every expert gets a token: of stacked ones by the router's choices, of lists by calls."""
        seeds = [found.trial, *(self.run(found.recipe, seed) for seed in _SEEDS[1:])]
        return all(not trial.unrouted and not self.silent_experts(trial) for trial in seeds)

    # What it trains

    def train_more(self, found: Found) -> Found:
        """Change one input after the other as long as that leaves fewer linears without a gradient."""
        untrained = self.untrained(found)
        while untrained and not self.is_over:
            tried = (self.attempt(recipe) for recipe in variations(self.facts, found.recipe))
            better = ((self.untrained(one), one) for one in tried if one is not None)
            fewer = next(((left, one) for left, one in better if left < untrained), None)
            if fewer is None:
                break
            untrained, found = fewer
        return found

    def untrained(self, found: Found) -> int:
        """Count the linears that get no gradient: all of them where there is no backward pass."""
        import torch

        model = self.facts.model
        try:
            batch = make_batch(found.recipe, model, _ROWS, torch.Generator().manual_seed(0))
            left = without_gradient(model, cast_inputs(model, batch))
        except Exception:
            return self.total
        return sum(site.is_linear for site in left)

    def silent_experts(self, trial: Trial) -> frozenset[str]:
        """Return linears that were not called, in a list of modules of which another one was."""
        every = {path for path, module in self.facts.model.named_modules() if is_linear(module)}
        called = {_unnumbered(path) for path in trial.linears}
        return frozenset(
            path for path in every - trial.linears if "experts." in path and _unnumbered(path) in called
        )


def _furthest(failed: Iterable[Trial]) -> Failure | None:
    """Return the failure of the trial that reached most, the last of such."""
    furthest: Trial | None = None
    for trial in failed:
        if furthest is None or trial.reach >= furthest.reach:
            furthest = trial
    return furthest.failure if furthest else None


def _untried() -> Failure:
    error = TimeoutError("the time was over before this modality was tried")
    return Failure(error, str(error))


def _unnumbered(path: str) -> str:
    head, _, tail = path.rpartition("experts.")
    return f"{head}experts.*.{tail.partition('.')[2]}"
