"""Which sites of a model no gradient reaches: from the table of known classes, or found on the model's twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from graftkit.errors import GraftError
from graftkit.families import family_of
from graftkit.families._known_twins import KnownTwin, known_twin
from graftkit.progress import Progress
from graftkit.surveying.sites import Architecture, ModelMap
from graftkit.text import describe
from graftkit.twins.budget import within
from graftkit.twins.example_batch import example_batch
from graftkit.twins.reach import NoGradient
from graftkit.twins.reaching.find import find_patterns, sites_meant
from graftkit.twins.remembered import Fact, recall, remember
from graftkit.twins.shrink import shrink
from graftkit.twins.sizes.field_sizes import is_token_field
from graftkit.twins.source_hash import source_hash
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_Patterns = Mapping[str, Sequence[str]]
# What trying a twin of an unknown class may take.
_SECONDS = 60.0
# Fields of a configuration that choose no branch of a forward pass, beside ids of tokens and fractions.
_OF_NO_EFFECT = (
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "use_cache",
)


class Evidence(Enum):
    """Where the knowledge of what gets a gradient comes from."""

    TABLE = "table"
    TWIN = "twin"
    NONE = "none"


@dataclass(frozen=True)
class Reach:
    """Which sites of a model no gradient reaches.

    Attributes:
        evidence: "none" where it is not known; then nothing is unreached as far as is known.
        unreached: path -> cause.
        reason: why it is not known, for people to read; None where it is.
    """

    evidence: Evidence
    unreached: Mapping[str, NoGradient] = field(default_factory=dict)
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "evidence": self.evidence.value,
            "unreached": {path: cause.name.lower() for path, cause in self.unreached.items()},
            "reason": self.reason,
        }


def reach_of(model_map: ModelMap, on_progress: Callable[[Progress], None] | None = None) -> Reach:
    """Return which sites of a model no gradient reaches, and why.

    A class in the table of known twins costs nothing, unless some of its sites are unreached and the model's
    configuration differs from the one of the table in what decides that: then, as for a class that the table does
    not have, the model's own twin is asked, once: the answer is kept on disk.

    Args:
        model_map: of any model; nothing is known of a module that is not a transformers model.
        on_progress: called before a twin is made.
    """
    architecture = model_map.architecture
    if architecture is None:
        return Reach(Evidence.NONE, reason="it is not a transformers model, so no twin can be made of it")
    family = family_of(model_map.model.model_type)
    if family is not None and family.reach_unknown is not None:
        return Reach(Evidence.NONE, reason=family.reach_unknown)
    paths = [site.path for site in model_map]
    known = _known(architecture)
    if known is not None:
        return Reach(Evidence.TABLE, sites_meant(known, paths))
    found = _found(architecture, on_progress)
    if found.reason is not None:
        return Reach(Evidence.NONE, reason=found.reason)
    return Reach(Evidence.TWIN, sites_meant(found.unreached, paths))


# ---- the table ----


def _known(architecture: Architecture) -> _Patterns | None:
    """Return the table's patterns, None where it has none for this class and configuration."""
    entry = known_twin(architecture.model_class.__name__)
    if entry is None or entry.sources != source_hash(architecture.model_class):
        return None
    return entry.unreached if not entry.unreached or _is_of(entry, architecture.config) else None


def _is_of(entry: KnownTwin, config: PretrainedConfig) -> bool:
    """Check whether a configuration makes the same twin as the entry's, weights' names and sizes apart."""
    try:
        same = _decisive(config, entry) == _decisive(type(config)(), entry)
    except (GraftError, TypeError, ValueError):
        return False
    return same


def _decisive(config: PretrainedConfig, entry: KnownTwin) -> dict[str, Any]:
    return _without_values(shrink(config, kept=entry.kept).to_dict())


def _without_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's fields without those that choose no branch: token ids, fractions, names."""
    return {
        name: _without_values(value) if isinstance(value, Mapping) else value
        for name, value in ((str(name), value) for name, value in fields.items())
        if not (name.startswith("_") or name in _OF_NO_EFFECT or isinstance(value, float) or is_token_field(name))
    }


# ---- the twin ----


@dataclass(frozen=True)
class _Finding:
    """What a twin shows, as it is kept on disk."""

    unreached: _Patterns = field(default_factory=dict)
    reason: str | None = None


def _found(architecture: Architecture, on_progress: Callable[[Progress], None] | None) -> _Finding:
    """Return what the model's own twin shows, or what it showed before."""

    model_class = architecture.model_class
    depends_on = _without_values(architecture.config.to_dict())
    if (remembered := recall(Fact.UNREACHED, model_class, depends_on)) is not None:
        return _Finding(**remembered)
    if on_progress is not None:
        on_progress(Progress(f"trying on a twin of {model_class.__name__} what gets a gradient", 0, None))
    try:
        found = _tried(architecture, on_progress)
    except Exception as error:  # of the model's own code: that a forward ran does not mean that a backward does
        return _Finding(reason=f"its twin fails: {describe(error)}")
    remember(Fact.UNREACHED, model_class, asdict(found), depends_on)
    return found


def _tried(architecture: Architecture, on_progress: Callable[[Progress], None] | None) -> _Finding:
    try:
        model = twin(architecture, on_progress=on_progress)
        batch = example_batch(model, on_progress=on_progress)
        with within(_SECONDS):
            return _Finding(find_patterns(model, batch))
    except GraftError as error:
        return _Finding(reason=error.what)
