"""Run recipes, repaired as often as that helps, and keep what was tried and how it failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from graftkit.progress import Progress
from graftkit.twins.batches.candidates.audio import audios
from graftkit.twins.batches.candidates.images import images
from graftkit.twins.batches.candidates.videos import videos
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import Recipe, make_batch
from graftkit.twins.batches.repairs import repaired
from graftkit.twins.batches.trial import Failure, Trial, Trials, is_linear
from graftkit.twins.budget import OverBudgetError

ROWS = 2
_REPAIRS = 7
# So many candidates that fail in the same way: the next will too.
_SAME = 4
# Seconds that a trial may take when there is hardly any time left.
_LEAST = 0.5


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


@dataclass
class Search:
    """The search on one model.

    Attributes:
        facts: what the model says about its inputs.
        trials: runs it.
        deadline: of this thread's computing time, in seconds.
        on_progress: called before each trial.
        failures: of candidates that nothing else is known to run beside.
        seen: how often repairs ended at a failure.
        best: the most linears that a recipe reached.
        tried: recipes, as text.
        unfed: the best candidate's failure for each modality without one that runs.
    """

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
        of_modalities = {"image": images, "audio": audios, "video": videos}
        self.options = {modality: groups(self.facts) for modality, groups in of_modalities.items()}

    @property
    def is_over(self) -> bool:
        """Check whether the time is over."""
        return time.thread_time() > self.deadline

    @property
    def share(self) -> float:
        """Return how many seconds one trial may take: half of what is left, so that none takes it all."""
        return max(_LEAST, (self.deadline - time.thread_time()) / 2)

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
            stopped = isinstance(trial.failure.error, OverBudgetError)
            changed = None if stopped else repaired(self.facts, recipe, trial.failure)
            if changed is None:
                self.seen[trial.failure.place] += 1
                return None
            recipe = changed
        return None

    def run(self, recipe: Recipe, seed: int = 0, rows: int = ROWS) -> Trial:
        """Run a recipe once."""
        import torch

        if self.on_progress:
            self.on_progress(Progress("looking for a batch", self.best, self.total))
        generator = torch.Generator().manual_seed(seed)
        return self.trials.run(lambda: make_batch(recipe, self.facts.model, rows, generator), self.share)

    def until_it_is_the_same(
        self, groups: Iterable[dict[str, str]], failures: list[Trial]
    ) -> Iterator[dict[str, str]]:
        """Yield candidates while their failures differ: one that all have in common is not theirs."""
        for group in groups:
            yield group
            failure = failures[-1].failure if failures else None
            if failure and failure.module and self.seen[failure.place] >= _SAME:
                return


def furthest(failed: Iterable[Trial]) -> Failure | None:
    """Return the failure of the trial that reached most, the last of such."""
    furthest: Trial | None = None
    for trial in failed:
        if furthest is None or trial.reach >= furthest.reach:
            furthest = trial
    return furthest.failure if furthest else None
