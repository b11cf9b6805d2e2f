"""What the checks are tried on: one twin of a family and one batch for it, made once for all methods."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.quantizing import quantized
from graftkit.errors import MissingDependencyError
from graftkit.matrix.cell import Outcome, Verdict
from graftkit.matrix.trials.outcomes import guarded
from graftkit.planning.quantization import plan_quantization
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.survey import survey
from graftkit.twins.example_batch import example_batch
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The order in which a page lists modalities; transformers' classes name them in any.
_MODALITIES = ("text", "image", "video", "audio")


@dataclass(frozen=True)
class Subject:
    """A family's twin and a batch that runs on it, or why there is none.

    Attributes:
        model_class: the class that the model type stands for; None where none was found.
        modalities: what transformers says that the class takes in.
        outcome: of the check "twin".
        twin, batch: None where they could not be made. The twin is never changed: checks work on copies.
    """

    model_type: str
    seed: int
    model_class: str | None
    modalities: tuple[str, ...]
    outcome: Outcome
    twin: PreTrainedModel | None = field(default=None, repr=False)
    batch: Mapping[str, Any] | None = field(default=None, repr=False)

    @cached_property
    def in_4_bit(self) -> PreTrainedModel | None:
        """The twin with its linears quantized to 4 bits; None where bitsandbytes quantizes none of them."""
        if self.twin is None or not plan_quantization(survey(self.twin), "4bit").quantized:
            return None
        return quantized(self.twin, "4bit")


def prepare(model_type: str, *, seed: int = 0) -> Subject:
    """Build the twin of a model type and a batch for it. What goes wrong is in the outcome."""
    began = time.monotonic()
    made: dict[str, Any] = {}

    def build() -> Outcome:
        made["twin"] = twin(model_type, seed=seed)
        made["batch"] = example_batch(made["twin"], seed=seed)
        parameters = sum(parameter.numel() for parameter in made["twin"].parameters())
        figures = {"parameters": parameters, "inputs": sorted(made["batch"])}
        return Outcome(Verdict.PROVEN, f"a twin of {parameters:,} parameters runs a batch", evidence=figures)

    outcome = guarded(build)
    model_class = type(made["twin"]) if "twin" in made else _model_class(model_type)
    if outcome.verdict is not Verdict.PROVEN:
        made = {}
        outcome = _without_twin(model_type, model_class, outcome)
    return Subject(
        model_type,
        seed,
        None if model_class is None else model_class.__name__,
        modalities_of(model_class),
        outcome.after(time.monotonic() - began),
        **made,
    )


def _model_class(model_type: str) -> type[PreTrainedModel] | None:
    try:
        return model_class_of(load_config(model_type))
    except Exception:  # a configuration that cannot be made from its defaults raises errors of every kind
        return None


def _without_twin(model_type: str, model_class: type[PreTrainedModel] | None, outcome: Outcome) -> Outcome:
    """Say of a family without a twin how many linears its default configuration has: what is missed."""
    if MissingDependencyError.code in outcome.codes:
        return Outcome(Verdict.UNKNOWN, outcome.message, outcome.codes, outcome.evidence)
    if model_class is None:
        return Outcome(Verdict.NOT_APPLICABLE, outcome.message, outcome.codes, outcome.evidence)
    try:
        linears: int | None = sum(site.is_linear for site in survey(model_type))
    except Exception:  # as above
        linears = None
    evidence = {**outcome.evidence, "linears_by_default": linears}
    return Outcome(outcome.verdict, outcome.message, outcome.codes, evidence)


def modalities_of(model_class: type[PreTrainedModel] | None) -> tuple[str, ...]:
    """Return what a class says that it takes in, "text" first.

    Source: ``transformers.PreTrainedModel.input_modalities``, a name or several.
    """
    try:
        said: Any = getattr(model_class, "input_modalities", ())
    except ImportError:  # transformers' stand-in for a class that needs a package that is not installed
        return ()
    names = {said} if isinstance(said, str) else set(said)
    return (*(name for name in _MODALITIES if name in names), *sorted(names - set(_MODALITIES)))
