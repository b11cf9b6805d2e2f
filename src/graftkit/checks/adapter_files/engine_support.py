"""What a saved adapter asks of the engine that is to serve it, and what the engine does with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.checks.adapter_files.base_fit import BaseFit
from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, failed, passed, unknown
from graftkit.engines import Engine, Fact, Feature, Stance
from graftkit.findings import Severity
from graftkit.planning.initializers import moves_base
from graftkit.text import some

# Parts of a model that serve other modalities than text. Engines treat them apart from the language model.
_TOWERS = frozenset({"vision", "audio", "projector"})
# The roles of linears that make an attention's values.
_VALUES = frozenset({"attention.v", "attention.qkv", "attention.kv"})
_TENSORS: Mapping[Feature, str] = {
    Feature.DORA: "lora_magnitude_vector",
    Feature.TRAINABLE_TOKENS: "trainable_tokens_delta",
    Feature.EMBEDDING: "lora_embedding_A",
}

# Fields that change what a layer computes, in ways that nobody looked at in an engine. Source: peft.LoraConfig.
_VARIANTS = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
)


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


def features_of(saved: SavedAdapter, fit: BaseFit | None) -> dict[Feature, str]:
    """Return the features that an adapter asks of an engine, each with the field or tensor that shows it."""
    config = saved.file.config
    if saved.file.peft_type != "LORA":
        return {Feature.OTHER_METHOD: saved.file.peft_type}
    by_field = {
        Feature.DORA: config.get("use_dora"),
        Feature.BIAS: config.get("bias") not in (None, "none") or config.get("lora_bias"),
        Feature.ALORA: config.get("alora_invocation_tokens"),
        Feature.MOVED_BASE: moves_base(config.get("init_lora_weights")),
        Feature.MODULES_TO_SAVE: config.get("modules_to_save"),
        Feature.TRAINABLE_TOKENS: config.get("trainable_token_indices"),
        Feature.VARIANT: any(config.get(name) for name in _VARIANTS),
    }
    found = {feature: feature.value for feature, given in by_field.items() if given}
    tensors = saved.file.tensors
    found |= {f: name for f, part in _TENSORS.items() if (name := next((t for t in tensors if part in t), None))}
    return found | _head(saved, fit)


def _head(saved: SavedAdapter, fit: BaseFit | None) -> dict[Feature, str]:
    """Find LoRA on the output layer. Without a base it is known by its usual name, and its ties are unknown."""
    if fit is None:
        head = next((core for core in saved.modules if core.rpartition(".")[2] == "lm_head"), None)
        return {} if head is None else {Feature.LM_HEAD: head}
    site = next((s for core in saved.modules if (s := fit.sites.get(core)) and s.role == "lm_head"), None)
    if site is None:
        return {}
    return {Feature.TIED_HEAD if site.tied_to else Feature.LM_HEAD: site.path}


def modules_by_feature(fit: BaseFit) -> dict[Feature, list[str]]:
    """Return the adapted modules by the feature that an engine needs to apply them; most need none."""
    found: dict[Feature, list[str]] = {}
    for module in fit.saved.modules:
        feature = _feature_of(module, fit)
        if feature is not None:
            found.setdefault(feature, []).append(module)
    lone = _queries_without_values(fit)
    return found | ({Feature.NO_VALUE: lone} if lone else {})


def _feature_of(module: str, fit: BaseFit) -> Feature | None:
    site = fit.sites.get(module)
    if site is None:
        return Feature.STACKED_EXPERTS if fit.holds_parameters(module) else Feature.OTHER_PREFIX
    if site.path != module:
        return Feature.INNER_NAMES
    return Feature.TOWERS if site.tower in _TOWERS else None


def _queries_without_values(fit: BaseFit) -> list[str]:
    """Return the adapted query projections whose layer has no adapter on its values."""
    layers: dict[str, dict[str, str]] = {}
    for module in fit.saved.modules:
        site = fit.sites.get(module)
        if site is not None and site.tower not in _TOWERS:
            layers.setdefault(module.rpartition(".")[0], {})[site.role] = module
    return [
        query
        for roles in layers.values()
        if (query := roles.get("attention.q")) is not None
        and not _VALUES.intersection(roles)
        and sibling(query, "q", "v") not in fit.saved.modules
    ]


def sibling(path: str, role: str, other: str) -> str | None:
    """Return the projection of another role in the same layer ("k_proj" -> "v_proj"), None for other names."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{other}{leaf.removeprefix(role)}" if leaf.startswith(f"{role}_") else None


_Asked = Mapping[Feature, Sequence[str]]


def judge_features(engine: Engine, asked: _Asked, bad: frozenset[Stance], good: str) -> Observation:
    """Judge what is asked of an engine: failed for any ``bad`` stance, unknown for an unknown one, else passed."""
    facts = [engine.fact(feature) for feature in asked]
    refused = [fact for fact in facts if fact.stance in bad]
    if refused:
        return _refused(engine, refused, asked)
    unsure = [fact for fact in facts if fact.stance is Stance.UNKNOWN]
    if unsure:
        return unknown(_message(engine, unsure, asked), help=unsure[0].help, **_evidence(engine, unsure))
    return passed(good, engine=str(engine))


def judge_modules(context: CheckContext, features: Iterable[Feature], bad: Stance, other: Stance) -> Observation:
    """Judge the adapted modules that need these features: failed for a ``bad`` stance of the engine.

    Features for which its stance is ``other`` are left to another rule.
    """
    require_lora(context)
    engine, modules = context.engine, modules_by_feature(context.fit)
    wanted = [feature for feature in features if feature in modules]
    asked = {feature: modules[feature] for feature in wanted if engine.fact(feature).stance is not other}
    good = f"{engine} takes all {len(context.saved.modules)} adapted modules"
    return judge_features(engine, asked, frozenset({bad}), good)


def _refused(engine: Engine, facts: list[Fact], asked: _Asked) -> Observation:
    hard = [fact for fact in facts if fact.flag is None]
    first = (hard or facts)[0]
    return failed(
        _message(engine, facts, asked),
        where=asked[first.feature][0],
        help="; ".join(dict.fromkeys(filter(None, (_advice(fact) for fact in facts)))),
        # Where a flag enables it, it depends on how the server is started, which is not known here.
        severity=None if hard else Severity.WARNING,
        **_evidence(engine, facts),
    )


def _evidence(engine: Engine, facts: list[Fact]) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "features": [fact.feature.value for fact in facts],
        "sources": [fact.source for fact in facts],
    }


def _advice(fact: Fact) -> str | None:
    if fact.flag is None:
        return fact.help
    return ", ".join(filter(None, (f"start the server with {fact.flag}", fact.help)))


def _message(engine: Engine, facts: Iterable[Fact], asked: _Asked) -> str:
    return "; ".join(f"{engine} {fact.says} ({some(asked[fact.feature])})" for fact in facts)


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
