"""What an engine does not take, whatever an adapter's form: its own facts say so."""

from __future__ import annotations

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Slice
from graftkit.engines import Engine, Feature, Stance, engine_named
from graftkit.surveying import kinds

# Parts of a model that serve other modalities than text.
_TOWERS = frozenset({"vision", "audio", "projector"})
_BAD = frozenset({Stance.REFUSES, Stance.IGNORES})


def refused(deltas: Deltas, base: ConvertBase, name: str) -> dict[str, str]:
    """Return what an engine has no place for: parameter or field -> the reason."""
    engine = engine_named(name)
    reasons = {other.name: _says(engine, other.feature) for other in deltas.others}
    for factors in deltas:
        feature = feature_of(factors.at, base)
        fact = None if feature is None else engine.fact(feature)
        # With a flag it depends on how the server is started.
        if fact is not None and fact.stance in _BAD and fact.flag is None:
            reasons[factors.at.parameter] = f"{engine} {fact.says}"
        elif not _is_matrix(factors.at, base):
            reasons[factors.at.parameter] = f"{engine} takes updates of matrices, and this is none"
    return reasons


def _says(engine: Engine, feature: Feature) -> str:
    fact = engine.fact(feature)
    return f"{engine} {fact.says}" if fact.stance in _BAD else f"{feature.words} cannot be written as factors"


def feature_of(at: Slice, base: ConvertBase) -> Feature | None:
    """Return what an engine needs to apply an update there, beyond LoRA on a linear."""
    site = base.site(at.parameter)
    if site is None:
        return None
    if site.tower in _TOWERS:
        return Feature.TOWERS
    if site.kind == kinds.EMBEDDING:
        return Feature.EMBEDDING
    if site.role == "lm_head":
        return Feature.TIED_HEAD if site.tied_to else Feature.LM_HEAD
    return None


def _is_matrix(at: Slice, base: ConvertBase) -> bool:
    site = base.site(at.parameter)
    return site is not None and site.kind not in {kinds.CONV, kinds.MULTIHEAD}
