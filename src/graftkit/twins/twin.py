"""Configuration -> a live, tiny, random model of the same class."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError, GraftError
from graftkit.families._known_twins import known_twin
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.modeling.threads import one_thread
from graftkit.modeling.unwrapping import base_model_of
from graftkit.progress import Progress
from graftkit.surveying.sites import Architecture
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.bounds import calibrate_bounds
from graftkit.twins.budget import within
from graftkit.twins.description import attach_description
from graftkit.twins.example_batch import example_batch, search_batch
from graftkit.twins.faithful.differences import Difference
from graftkit.twins.faithful.keep_structure import compare, keep_structure
from graftkit.twins.ladder import SECONDS, Attempt, Ladder, TooLargeError
from graftkit.twins.remembered import Fact, recall, remember
from graftkit.twins.shrink import no_twin, shrink
from graftkit.twins.weights import redraw_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# A shrunk model with more parameters is not built: the rules do not know what makes it large.
_MOST_PARAMETERS = 200_000_000
# What building one model may take, with weights or without, in seconds.
_BUILD_SECONDS = 20.0


def twin(
    source: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> PreTrainedModel:
    """Build a live, tiny model of the same architecture as ``source``: same class, random weights, on the CPU.

    The twin is in eval mode. Its weights are drawn so that logits depend on the input and every tower gets a
    gradient; wrappers with infinite clip bounds get bounds that clamp a few percent of their activations. The
    same ``seed`` gives the same weights, and torch's global random state does not change.

    A class that graftkit does not know yet is shrunk less, step by step, until an example batch runs on the twin,
    for a minute at most. ``gk.describe_twin`` says what was shrunk, and what was not.

    Args:
        source: a model, a configuration, a path, a model type, a hub id, or the ``architecture`` of a survey.
        seed: of the weights.
        dtype: of the floating-point weights; float32 if None.
        overrides: configuration values the twin must have (see ``shrink``).
        trust_remote_code: let configuration and model code from the hub or from a directory run.
        revision: branch, tag or commit of a hub id.
        on_progress: called before each step of an unknown class.

    Raises:
        SourceError: ``source`` names no model.
        BuildError: code ``twin``: the class cannot be built from the shrunk configuration.
    """
    import torch

    config, model_class = _resolve(source, trust_remote_code, revision)
    made = _Recipe(config, model_class, overrides, dtype or torch.float32, seed)
    with quiet_transformers(), one_thread(), torch.random.fork_rng(devices=[]):
        differs: tuple[Difference, ...] | None = None
        built = _known(made)
        if built is None:
            built, differs = _climbed(made, on_progress)
        model = built.model
        assert model is not None
        if bounded_wrappers(model):
            calibrate_bounds(model, built.found.batch if built.found else _batch_or_none(model))
    attach_description(model, config, kept=built.kept, runs=built.runs, differs=differs)
    return model


@dataclass(frozen=True)
class _Recipe:
    """How a twin of one configuration is made, whatever of it is kept."""

    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    overrides: Mapping[str, Any] | None
    dtype: torch.dtype
    seed: int

    def build(self, kept: frozenset[str]) -> PreTrainedModel:
        """Return the model in eval mode, its weights redrawn, with these fields at full size."""
        import torch

        # The caller restores the CPU's generator.
        torch.default_generator.manual_seed(self.seed)
        small = shrink(self.config, self.overrides, kept=kept)
        with within(_BUILD_SECONDS):
            _refuse_large(self.model_class, small, must_be_known=bool(kept))
            model = _build(self.model_class, small, self.dtype)
            redraw_weights(model, torch.Generator().manual_seed(self.seed))
        return model.eval()


def _known(made: _Recipe) -> Attempt | None:
    """Return the twin of a class that the table knows, or None where that does not fit the configuration."""
    known = known_twin(made.model_class.__name__)
    remembered = known.kept if known else recall(Fact.KEPT, made.model_class)
    if remembered is None:
        return None
    kept = frozenset(remembered)
    try:
        return Attempt(kept, made.build(kept))
    except BuildError:
        return None


def _climbed(
    made: _Recipe, on_progress: Callable[[Progress], None] | None
) -> tuple[Attempt, tuple[Difference, ...] | None]:
    """Return the smallest twin that runs and is built like the full model, and in what it is not.

    It is remembered for classes that transformers does not have.
    """
    until = time.thread_time() + SECONDS
    full = _full(made)
    start: frozenset[str] = frozenset()
    with suppress(BuildError):
        start = start if full is None else keep_structure(full, made.overrides).kept
    left = until - time.thread_time()
    built = Ladder(made.config, made.build, search_batch, made.overrides, start, on_progress, left).climb()
    if built.found is not None and not made.overrides:
        remember(Fact.KEPT, made.model_class, sorted(built.kept))
        if built.found.recipe:
            remember(Fact.BATCH, made.model_class, built.found.recipe)
    differs = None
    with suppress(BuildError), within(_BUILD_SECONDS):
        differs = None if full is None else compare(full, built.kept, made.overrides).differs
    return built, differs


def _full(made: _Recipe) -> PreTrainedModel | None:
    try:
        with within(_BUILD_SECONDS):
            return build_on_meta(made.config, made.model_class)
    except BuildError:
        return None


def _resolve(
    source: Any, trust_remote_code: bool, revision: str | None
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    from transformers import PreTrainedModel

    if isinstance(source, Architecture):
        return source.config, source.model_class
    model = base_model_of(source)
    if isinstance(model, PreTrainedModel):
        return model.config, type(model)
    loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    try:
        return loaded.config, model_class_of(loaded)
    except GraftError:
        raise
    except Exception as error:
        what = f"the model class for {type(loaded.config).__name__} could not be found"
        raise no_twin(what, loaded.config, error, "pass the model itself: gk.twin(model)") from error


def _build(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return model_class._from_config(config, dtype=dtype)
    except Exception as error:
        what = f"{model_class.__name__} cannot be built from its shrunk configuration"
        help = "pass overrides for the values it names: gk.twin(source, overrides={...})"
        raise no_twin(what, config, error, help) from error


def _refuse_large(model_class: type[PreTrainedModel], config: PretrainedConfig, *, must_be_known: bool) -> None:
    """Refuse a model that is not small; where that is asked, also one whose size only building it would tell."""
    try:
        size = sum(p.numel() for p in build_on_meta(config, model_class).parameters())
    except BuildError:
        if must_be_known:
            raise
        return  # some classes compute with values while they are built: _build() reports a failure
    if size > _MOST_PARAMETERS:
        raise TooLargeError(
            f"no twin: shrunk, {model_class.__name__} would still have {size:,} parameters",
            where=config.model_type,
            why="its configuration sets sizes under names that the shrinking rules do not know",
            help="pass overrides for its size fields: gk.twin(source, overrides={...})",
        )


def _batch_or_none(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    try:
        return example_batch(model)
    except BuildError:
        return None
