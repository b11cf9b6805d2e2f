"""What an engine does not take in any form: its own facts say what merging alone helps with."""

from __future__ import annotations

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas
from graftkit.engines import Engine, Fact, Feature, Model, Remedy, Stance, engine_named
from graftkit.engines.base import OTHER_MODALITIES
from graftkit.surveying import kinds

_BAD = frozenset({Stance.REFUSES, Stance.IGNORES})


def refused(deltas: Deltas, base: ConvertBase, name: str) -> dict[str, str]:
    """Return what an engine has no place for: parameter or field -> the reason."""
    engine = engine_named(name)
    model = Model(base.architecture, base.model_map.model.model_type)
    of_class = engine.fact(Feature.MODEL_CLASS, model)
    reasons = {base.architecture: f"{engine} {of_class.says}"} if _stops(of_class) else {}
    reasons |= {other.name: _of_other(engine, model, other.feature) for other in deltas.others}
    for parameter in deltas.by_parameter():
        leaf = parameter.removesuffix(".weight").rpartition(".")[2]
        feature = feature_of(parameter, base)
        if feature is None:
            reasons[parameter] = f"{engine} takes updates of matrices, and this is none"
        elif _stops(fact := engine.fact(feature, model, leaf)):
            reasons[parameter] = f"{engine} {fact.says}"
    return reasons


def notes_on(deltas: Deltas, base: ConvertBase, name: str) -> tuple[str, ...]:
    """Return what a converted adapter still depends on: options of the server, and what nobody has looked at."""
    engine = engine_named(name)
    model = Model(base.architecture, base.model_map.model.model_type)
    notes = []
    for parameter in deltas.by_parameter():
        feature = feature_of(parameter, base)
        leaf = parameter.removesuffix(".weight").rpartition(".")[2]
        fact = None if feature is None else engine.fact(feature, model, leaf)
        if fact is not None and fact.stance is Stance.UNKNOWN:
            notes.append(f"{engine} {fact.says} on {base.architecture}: graft prove shows it")
        elif fact is not None and fact.stance in _BAD and fact.flag is not None:
            notes.append(f"start the server with {fact.flag}")
    return tuple(dict.fromkeys(notes))


def _stops(fact: Fact) -> bool:
    """Check whether neither a conversion nor an option of the server helps."""
    return fact.stance in _BAD and fact.flag is None and fact.remedy is not Remedy.CONVERT


def _of_other(engine: Engine, model: Model, feature: Feature) -> str:
    fact = engine.fact(feature, model)
    return f"{engine} {fact.says}" if fact.stance in _BAD else f"{feature.words} cannot be written as factors"


def feature_of(parameter: str, base: ConvertBase) -> Feature | None:
    """Return what an engine needs to apply an update there; None where no engine could."""
    site = base.site(parameter)
    if site is None or site.kind in {kinds.CONV, kinds.MULTIHEAD}:
        return None
    if site.tower in OTHER_MODALITIES:
        return Feature.TOWERS
    if site.kind == kinds.EMBEDDING:
        return Feature.TIED_EMBEDDING if site.tied_to else Feature.EMBEDDING
    if site.role == "lm_head":
        return Feature.TIED_HEAD if site.tied_to else Feature.LM_HEAD
    if site.role == "router":
        return Feature.ROUTER
    return Feature.STACKED_EXPERTS if base.is_stacked(parameter) else Feature.LINEAR
