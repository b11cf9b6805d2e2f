"""What an engine does with what a saved adapter asks of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.checks.adapter_files.asked import Asked, asked_by_modules, model_of
from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, failed, passed, unknown
from graftkit.engines import Engine, Fact, Feature, Model, Remedy, Stance
from graftkit.findings import Severity
from graftkit.text import some


def require_lora(context: CheckContext) -> None:
    """Check that the adapter is a LoRA in the model's layers.

    Raises:
        UndecidableError: it is not, or PEFT cannot use its configuration.
    """
    saved = context.saved
    if saved.file.peft_type != "LORA":
        raise UndecidableError(f"the adapter is not a LoRA: {some([saved.file.peft_type])}")
    if saved.prefix is None:
        raise UndecidableError("the adapter has no tensors in the model's layers")


def judge(engine: Engine, model: Model, asked: Iterable[Asked], bad: frozenset[Stance], good: str) -> Observation:
    """Judge what is asked of an engine: failed for any ``bad`` stance, unknown for an unknown one, else passed.

    Args:
        model: the base, for facts by architecture.
    """
    found = _facts(engine, model, asked)
    refused = {fact: places for fact, places in found.items() if fact.stance in bad}
    if refused:
        return _refused(engine, refused)
    unsure = {fact: places for fact, places in found.items() if fact.stance is Stance.UNKNOWN}
    if unsure:
        help = next(filter(None, (engine.advice(fact) for fact in unsure)), None)
        return unknown(_message(engine, unsure), help=help, **_evidence(engine, unsure))
    return passed(good, engine=str(engine))


def judge_modules(context: CheckContext, bad: Stance) -> Observation:
    """Judge the adapted modules: failed for a ``bad`` stance of the engine, and for no other."""
    require_lora(context)
    engine, fit = context.engine, context.fit
    good = f"{engine} takes all {len(context.saved.modules)} adapted modules"
    return judge(engine, model_of(fit), asked_by_modules(fit), frozenset({bad}), good)


_Found = Mapping[Fact, Sequence[str]]


def _facts(engine: Engine, model: Model, asked: Iterable[Asked]) -> dict[Fact, list[str]]:
    """Return each fact that applies, with the places that ask for it."""
    places: dict[tuple[Feature, str | None], list[str]] = {}
    for one in asked:
        places.setdefault((one.feature, one.name), []).append(one.at)
    found: dict[Fact, list[str]] = {}
    for (feature, name), at in places.items():
        found.setdefault(engine.fact(feature, model, name), []).extend(at)
    return found


def _refused(engine: Engine, found: _Found) -> Observation:
    hard = [fact for fact in found if fact.flag is None]
    first = (hard or list(found))[0]
    wanted = _to_advise(found)
    return failed(
        _message(engine, found),
        where=found[first][0],
        help="; ".join(dict.fromkeys(filter(None, (engine.advice(fact) for fact in wanted)))),
        # Where a flag enables it, it depends on how the server is started, which is not known here.
        severity=None if hard else Severity.WARNING,
        remedies=sorted({fact.remedy.value for fact in wanted if fact.remedy is not None}),
        **_evidence(engine, found),
    )


def _to_advise(found: _Found) -> list[Fact]:
    """Return the facts whose advice helps: a merge leaves nothing to convert, and some things nothing helps."""
    lost = [fact for fact in found if fact.remedy is None and fact.flag is None]
    merged = any(fact.remedy is Remedy.MERGE for fact in found)
    return lost or [fact for fact in found if not merged or fact.remedy is not Remedy.CONVERT]


def _evidence(engine: Engine, found: _Found) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "features": list(dict.fromkeys(fact.feature.value for fact in found)),
        "stances": sorted({fact.stance.value for fact in found}),
        "sources": list(dict.fromkeys(fact.source for fact in found)),
    }


def _message(engine: Engine, found: _Found) -> str:
    said: dict[str, list[str]] = {}
    for fact, places in found.items():
        said.setdefault(fact.says, []).extend(places)
    return "; ".join(f"{engine} {says} ({some(places)})" for says, places in said.items())


@dataclass(frozen=True, slots=True)
class Scale:
    """The factor on one module's update in PEFT (``trained``) and in the engine (``served``)."""

    trained: float
    served: float

    @property
    def ratio(self) -> float:
        return self.served / self.trained if self.trained else math.inf


def scales(saved: SavedAdapter, engine: Engine) -> dict[str, Scale]:
    """Return each module's scale in PEFT and in the engine.

    Source: ``peft.tuners.lora.layer.LoraLayer.update_layer``.

    Raises:
        UndecidableError: it is not known how the engine scales.
    """
    facts = [engine.fact(feature) for feature in _scale_features(saved)]
    unsure = [fact for fact in facts if fact.stance is Stance.UNKNOWN]
    if unsure:
        raise UndecidableError("; ".join(f"{engine} {fact.says}" for fact in unsure), engine=str(engine))
    takes = {fact.feature for fact in facts if fact.stance is Stance.TAKES}
    rooted = bool(saved.file.config.get("use_rslora"))
    found = {}
    for module in saved.modules:
        rank, alpha = saved.rank(module), saved.alpha(module)
        served_rank = rank if Feature.RANK_PATTERN in takes else saved.default_rank
        served_alpha = alpha if Feature.ALPHA_PATTERN in takes else saved.default_alpha
        served = _scale(served_alpha, served_rank, rooted and Feature.RSLORA in takes)
        found[module] = Scale(_scale(alpha, rank, rooted), served)
    return found


def _scale_features(saved: SavedAdapter) -> list[Feature]:
    config = saved.file.config
    asked = {
        Feature.RSLORA: config.get("use_rslora"),
        Feature.RANK_PATTERN: config.get("rank_pattern"),
        Feature.ALPHA_PATTERN: config.get("alpha_pattern"),
    }
    return [feature for feature, given in asked.items() if given]


def _scale(alpha: float, rank: int, rooted: bool) -> float:
    return alpha / (math.sqrt(rank) if rooted else rank)
