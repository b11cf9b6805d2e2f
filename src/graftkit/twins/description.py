"""What a twin has of the model it stands for, and what it has not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import GraftError
from graftkit.modeling.unwrapping import base_model_of
from graftkit.text import count, some
from graftkit.twins.faithful.differences import Difference
from graftkit.twins.shrink import config_differences
from graftkit.twins.sizes.field_sizes import EXPERTS, LAYER_COUNTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PretrainedConfig, PreTrainedModel

_ATTRIBUTE = "_graftkit_twin_description"


@dataclass(frozen=True)
class ChangedField:
    """A field of the configuration that is not as it was.

    Attributes:
        path: its dotted path.
        source: its value in the model that the twin stands for.
        twin: its value in the twin; None where it was dropped.
    """

    path: str
    source: Any
    twin: Any

    @property
    def name(self) -> str:
        """Return the field's name, without the part it belongs to."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class TwinDescription:
    """How a twin was made from its source.

    Attributes:
        model_class: name of the class of both.
        model_type: of the source's configuration.
        parameters: how many the twin has; shared ones count once.
        kept: what was not shrunk, as patterns over the configuration's fields
            (``graftkit.twins.sizes.kept`` says what they mean).
        changes: every field that was shrunk or dropped.
        runs: whether an example batch ran on it when it was built; None where it is known, and was not tried.
        differs: in what its structure differs from the full model's, beyond how often modules repeat; None where
            it is known, and was not compared.
    """

    model_class: str
    model_type: str
    parameters: int
    kept: tuple[str, ...]
    changes: tuple[ChangedField, ...]
    runs: bool | None
    differs: tuple[str, ...] | None

    @property
    def layers(self) -> tuple[ChangedField, ...]:
        """Return the counts of layers that are fewer."""
        return tuple(change for change in self.changes if change.name in LAYER_COUNTS)

    @property
    def experts(self) -> tuple[ChangedField, ...]:
        """Return the counts of experts that are fewer."""
        return tuple(change for change in self.changes if change.name in EXPERTS)

    @property
    def widths(self) -> tuple[ChangedField, ...]:
        """Return the other sizes that are smaller."""
        counted = (*self.layers, *self.experts)
        return tuple(c for c in self.changes if c not in counted and _is_smaller(c))

    @property
    def dropped(self) -> tuple[ChangedField, ...]:
        """Return the fields that the twin does not have."""
        return tuple(change for change in self.changes if change.twin is None)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON-ready fields."""
        return {
            "model_class": self.model_class,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "kept": list(self.kept),
            "changes": {change.path: {"source": change.source, "twin": change.twin} for change in self.changes},
            "runs": self.runs,
            "differs": None if self.differs is None else list(self.differs),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def describe_twin(model: Any) -> TwinDescription:
    """Return how a twin was made: what was shrunk, to what, and what was kept.

    Args:
        model: what ``gk.twin`` returned, or a PEFT model around it.

    Raises:
        GraftError: code ``no-twin``: the model is none.
    """
    found = getattr(base_model_of(model), _ATTRIBUTE, None)
    if isinstance(found, TwinDescription):
        return found
    raise GraftError(
        f"{type(base_model_of(model)).__name__} is not a twin",
        why="only what gk.twin() returns has a description",
        help="twin = gk.twin(model)",
        code="no-twin",
    )


def attach_description(
    model: PreTrainedModel,
    source: PretrainedConfig,
    *,
    kept: Iterable[str],
    runs: bool | None,
    differs: tuple[Difference, ...] | None,
) -> None:
    """Let ``describe_twin`` find out how this model was made from the configuration."""
    changes = dict(config_differences(source.to_dict(), model.config.to_dict()))
    description = TwinDescription(
        model_class=type(model).__name__,
        model_type=source.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kept=tuple(sorted(kept)),
        changes=tuple(ChangedField(path, *values) for path, values in sorted(changes.items())),
        runs=runs,
        differs=None if differs is None else tuple(str(difference) for difference in differs),
    )
    setattr(model, _ATTRIBUTE, description)


def _is_smaller(change: ChangedField) -> bool:
    return isinstance(change.source, int) and isinstance(change.twin, int) and change.twin < change.source


def _lines(twin: TwinDescription) -> Iterator[str]:
    yield f"twin of {twin.model_class} ({twin.model_type}), {count(twin.parameters)} parameters"
    if twin.layers:
        yield f"  layers: {_shrunk(twin.layers, '{twin} of {source}')}"
    if twin.experts:
        yield f"  experts: {_shrunk(twin.experts, '{twin} of {source}')}"
    if twin.widths:
        yield f"  sizes: {_shrunk(twin.widths, '{source} to {twin}')}"
    if twin.kept:
        yield f"  at full size: {', '.join(twin.kept)}"
    if twin.dropped:
        yield f"  dropped: {', '.join(change.path for change in twin.dropped)}"
    if twin.differs:
        yield f"  other modules than the full model: {some(twin.differs, 8)}"
    if twin.runs is False:
        yield "  no example batch runs on it: pass your own"


def _shrunk(changes: tuple[ChangedField, ...], form: str) -> str:
    return some([f"{c.path} {form.format(source=c.source, twin=c.twin)}" for c in changes], 8)
