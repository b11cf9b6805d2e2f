"""The smallest twin that builds and runs: where shrinking goes too far, shrink less, step by step."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.progress import Progress
from graftkit.twins.batches.search import NoRecipe
from graftkit.twins.batches.trial import Failure
from graftkit.twins.budget import OverBudgetError, let_go
from graftkit.twins.example_batch import Searched
from graftkit.twins.shrink import changed_fields
from graftkit.twins.sizes.field_sizes import LAYER_COUNTS
from graftkit.twins.sizes.kept import EVERY_WIDTH, EVERYTHING, OWN_WIDTHS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# How long the climb for an unknown class may take in all.
SECONDS = 50.0
# Of that, what one step may take to find a batch; the first, at which most classes end, may take longer.
_FIRST_SEARCH, _LATER_SEARCH = 20.0, 8.0
# Errors that are followed: each names fields that the next step keeps.
_MOST_ERRORS = 6
_WORD = re.compile(r"[A-Za-z_]\w+")
# Frames of these packages say nothing about the model.
_LIBRARIES = re.compile(r"[/\\](torch|graftkit|huggingface_hub)[/\\]")


class TooLargeError(BuildError):
    """A shrunk configuration describes a model that is not small: shrinking less cannot help."""

    code = "twin"


@dataclass(frozen=True)
class Attempt:
    """One step: what it kept, and how far it came.

    Attributes:
        kept: what was not shrunk, as patterns over the configuration's fields.
        model: the twin, or None where it cannot be built.
        found: the batch that it ran on, and what that does not feed; None where none was found.
        error: why there is no model, no batch, or none that feeds everything.
    """

    kept: frozenset[str]
    model: PreTrainedModel | None = None
    found: Searched | None = None
    error: BuildError | None = None

    @property
    def runs(self) -> bool | None:
        """Whether a batch ran on the model; None where none was tried."""
        return None if self.found is None and self.error is None else self.found is not None

    @property
    def missing(self) -> float:
        """How many modalities the batch does not feed; infinite without a batch."""
        return len(self.found.unfed) if self.found else math.inf


@dataclass(frozen=True)
class Ladder:
    """How to climb for one configuration.

    Attributes:
        config: the full configuration.
        build: makes a live model of what ``shrink`` returns with these patterns kept. Raises ``BuildError``.
        find_batch: finds inputs that a model runs on, within so many seconds. Raises ``BuildError``.
        overrides: values that every step's configuration has.
        start: what every step keeps.
        on_progress: called before each step.
        seconds: how long the climb may take in all.
    """

    config: PretrainedConfig
    build: Callable[[frozenset[str]], PreTrainedModel]
    find_batch: Callable[[PreTrainedModel, float], Searched]
    overrides: Mapping[str, Any] | None = None
    start: frozenset[str] = frozenset()
    on_progress: Callable[[Progress], None] | None = None
    seconds: float = SECONDS

    def climb(self) -> Attempt:
        """Return the first step that builds and runs on a batch that feeds every modality it takes.

        Where there is none, the first that leaves the fewest unfed; where none runs, the first that builds.

        Nothing more is kept at first, then the fields that the errors name, then the widths of one part after the
        other, then everything but the layers, then these too.

        Raises:
            BuildError: no step gives a model. The error is that of the most shrunken configuration.
        """
        until = time.thread_time() + self.seconds
        attempts: list[Attempt] = []
        for kept in self._steps(attempts):
            left = until - time.thread_time()
            if left <= 0 and attempts:
                break
            if attempts and attempts[-1].error is not None:
                let_go(attempts[-1].error)
            attempts.append(_light(self._attempt(kept, len(attempts), left), attempts))
            if not attempts[-1].missing:
                break
        best = min(attempts, key=lambda attempt: attempt.missing)
        if best.found is not None:
            return self._without_what_is_not_needed(best, until)
        for attempt in attempts:
            if attempt.model is not None:
                return attempt
        raise attempts[0].error or AssertionError("an attempt without a model has an error")

    def _steps(self, attempts: list[Attempt]) -> Iterator[frozenset[str]]:
        """Yield what to keep next; ``attempts`` has got the outcome of the last one by then."""
        yield self.start
        if isinstance(attempts[-1].error, TooLargeError | OverBudgetError):
            return
        for _ in range(_MOST_ERRORS):
            named = named_fields(self.config, attempts[-1].error, self._changed(attempts[-1].kept))
            if not named:
                break
            yield attempts[-1].kept | named
        parts = [name for name in self.config.sub_configs if hasattr(getattr(self.config, name, None), "to_dict")]
        for part in parts:
            yield self.start | {f"{part}.*"}
        if parts:
            yield self.start | {OWN_WIDTHS}
        yield self.start | {EVERY_WIDTH}
        yield self.start | {EVERYTHING}

    def _attempt(self, kept: frozenset[str], number: int, seconds: float) -> Attempt:
        if self.on_progress is not None:
            self.on_progress(Progress(_step(self.config, kept), number, None))
        try:
            model = self.build(kept)
        except BuildError as error:
            return Attempt(kept, error=error)
        try:
            found = self.find_batch(model, min(seconds, _FIRST_SEARCH if kept == self.start else _LATER_SEARCH))
        except BuildError as error:
            return Attempt(kept, model, error=error)
        return Attempt(kept, model, found, _unfed(found))

    def _without_what_is_not_needed(self, attempt: Attempt, until: float) -> Attempt:
        """Shrink each kept field after all, where the twin runs without it: an error names more than its cause."""
        named = sorted(attempt.kept - self.start)
        for name in named if len(named) > 1 else ():
            if time.thread_time() > until:
                break
            fewer = self._attempt(attempt.kept - {name}, len(attempt.kept), until - time.thread_time())
            if fewer.missing <= attempt.missing:
                attempt = fewer
        return attempt

    def _changed(self, kept: frozenset[str]) -> frozenset[str]:
        return frozenset(changed_fields(self.config, self.overrides, kept=kept))


def _light(attempt: Attempt, before: Sequence[Attempt]) -> Attempt:
    """Return an attempt without its model where an earlier one that is no worse has one: only one is returned."""
    if any(one.model is not None and one.missing <= attempt.missing for one in before):
        return replace(attempt, model=None)
    return attempt


def _unfed(found: Searched) -> BuildError | None:
    """Return the error of the first modality that a batch does not feed."""
    for modality, cause in found.unfed.items():
        error = BuildError(f"no batch with {modality} runs", why=str(cause), code="twin")
        error.__cause__ = cause
        return error
    return None


def _step(config: PretrainedConfig, kept: frozenset[str]) -> str:
    what = f" with {', '.join(sorted(kept))} at full size" if kept else ""
    return f"building a twin of {config.model_type}{what}"


def named_fields(config: PretrainedConfig, error: BaseException | None, changed: frozenset[str]) -> frozenset[str]:
    """Return those of the changed fields that an error names, in its message or in the line that raised it.

    Args:
        config: the full configuration, for the names that its parts' fields have in code.
        error: what building or running a twin raised.
        changed: dotted paths of the fields that are not as they were.
    """
    words = frozenset(_words(error))
    named = frozenset(path for path in changed if _names_of(config, path) & words)
    if named or not words & {"layer", "layers"}:
        return named
    return frozenset(path for path in changed if path.rpartition(".")[2] in LAYER_COUNTS)


def _words(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        if isinstance(error, NoRecipe):
            yield from _words_of_failure(error.failure)
        elif not isinstance(error, BuildError):
            lines = [(frame.filename, frame.line or "") for frame in traceback.extract_tb(error.__traceback__)]
            yield from _WORD.findall(f"{error} {_last_line(lines)}")
        error = error.__cause__


def _words_of_failure(failure: Failure | None) -> list[str]:
    if failure is None or isinstance(failure.error, BuildError):
        return []
    return _WORD.findall(f"{failure.error} {_last_line(failure.frames)}")


def _last_line(frames: Sequence[tuple[str, str]]) -> str:
    """Return the source line of the last call that is the model's own, of frames with their files."""
    return next((line for file, line in reversed(frames) if not _LIBRARIES.search(file)), "")


def _names_of(config: PretrainedConfig, path: str) -> set[str]:
    """Return a field's name, and the others under which code reads it."""
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    return {name, *(alias for alias, field in config.attribute_map.items() if field == name)}
