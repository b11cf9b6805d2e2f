"""Ways to look at an adapter as an engine that is to serve it would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.checks.adapter_files.base_fit import Fit
from graftkit.checks.adapter_files.saved_adapter import Saved
from graftkit.checks.engine.rule import Observation, failed, passed, unknown
from graftkit.engines import Engine, Fact, Feature, Stance
from graftkit.findings import Severity
from graftkit.planning.initializers import moves_base
from graftkit.surveying.sites import Site
from graftkit.text import some

if TYPE_CHECKING:
    from graftkit.checks.engine.context import CheckContext

# Parts of a model that serve other modalities than text. Engines treat them apart from the language model.
_TOWERS = frozenset({"vision", "audio", "projector"})
_WORDS_OF_TENSORS: Mapping[Feature, str] = {
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


def of_lora(check: Callable[[CheckContext], Observation]) -> Callable[[CheckContext], Observation]:
    """A check of what an engine does with LoRA's tensors, made to say "unknown" of an adapter that has none."""

    def checked(context: CheckContext) -> Observation:
        saved = context.saved
        if saved.problems:
            return unknown(f"the configuration cannot be used: {some(saved.problems)}")
        if saved.file.peft_type != "LORA":
            return unknown(f"{some([saved.file.peft_type])} is no LoRA")
        if saved.prefix is None:
            return unknown("the adapter keeps no tensors in a model's layers")
        return check(context)

    return checked


def moving_initializer(config: Mapping[str, Any]) -> str | None:
    """The initializer that changed the base before training, or None."""
    given = config.get("init_lora_weights")
    return given if moves_base(given) else None


def features_of(saved: Saved, fit: Fit | None) -> dict[Feature, str]:
    """What an adapter's configuration and tensors ask of an engine -> the field or tensor that says so."""
    config = saved.file.config
    if saved.file.peft_type != "LORA":
        return {Feature.OTHER_METHOD: saved.file.peft_type}
    by_field = {
        Feature.DORA: config.get("use_dora"),
        Feature.BIAS: config.get("bias") not in (None, "none") or config.get("lora_bias"),
        Feature.ALORA: config.get("alora_invocation_tokens"),
        Feature.MOVED_BASE: moving_initializer(config),
        Feature.MODULES_TO_SAVE: config.get("modules_to_save"),
        Feature.TRAINABLE_TOKENS: config.get("trainable_token_indices"),
        Feature.VARIANT: any(config.get(name) for name in _VARIANTS),
    }
    found = {feature: feature.value for feature, given in by_field.items() if given}
    found |= {f: name for f, word in _WORDS_OF_TENSORS.items() if (name := _tensor_with(saved, word)) is not None}
    return found | _head(saved, fit)


def _tensor_with(saved: Saved, word: str) -> str | None:
    return next((name for name in saved.file.tensors if word in name), None)


def _head(saved: Saved, fit: Fit | None) -> dict[Feature, str]:
    """LoRA on the output layer. Without a base it goes by its usual name, and its ties are unknown."""
    if fit is None:
        head = next((core for core in saved.modules if core.rpartition(".")[2] == "lm_head"), None)
        return {} if head is None else {Feature.LM_HEAD: head}
    site = next((s for core in saved.modules if (s := fit.sites.get(core)) and s.role == "lm_head"), None)
    if site is None:
        return {}
    return {Feature.TIED_HEAD if site.tied_to else Feature.LM_HEAD: site.path}


@dataclass(frozen=True)
class Served:
    """An adapter that fits a base, sorted by what engines differ about.

    Attributes:
        fit: the adapter held against the base.
    """

    fit: Fit

    @cached_property
    def modules(self) -> Mapping[Feature, tuple[str, ...]]:
        """Feature -> the adapted modules that need it."""
        found: dict[Feature, list[str]] = {}
        for core in self.fit.saved.modules:
            feature = self._feature(core)
            if feature is not None:
                found.setdefault(feature, []).append(core)
        lone = self._queries_without_values()
        return {f: tuple(cores) for f, cores in found.items()} | ({Feature.NO_VALUE: lone} if lone else {})

    def _feature(self, core: str) -> Feature | None:
        site = self.fit.sites.get(core)
        if site is None:
            return Feature.STACKED_EXPERTS if self.fit.holds_parameters(core) else Feature.OTHER_PREFIX
        if site.path != core:
            return Feature.INNER_NAMES
        return Feature.TOWERS if site.tower in _TOWERS else None

    def _queries_without_values(self) -> tuple[str, ...]:
        layers: dict[str, dict[str, str]] = {}
        for core, site in self._language_sites():
            layers.setdefault(core.rpartition(".")[0], {})[site.role] = core
        lone = ("attention.v", "attention.qkv", "attention.kv")
        extra = self.fit.saved.modules
        return tuple(
            roles["attention.q"]
            for roles in layers.values()
            if "attention.q" in roles
            and not any(role in roles for role in lone)
            and beside(roles["attention.q"], "q", "v") not in extra
        )

    def _language_sites(self) -> Iterable[tuple[str, Site]]:
        for core in self.fit.saved.modules:
            site = self.fit.sites.get(core)
            if site is not None and site.tower not in _TOWERS:
                yield core, site


def beside(path: str, before: str, after: str) -> str | None:
    """The projection of another role in the same layer ("k_proj" -> "v_proj"), or None where names do not tell."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{after}{leaf.removeprefix(before)}" if leaf.startswith(f"{before}_") else None


_Asked = Mapping[Feature, Sequence[str]]


def verdict(engine: Engine, asked: _Asked, bad: frozenset[Stance], good: str) -> Observation:
    """What an engine makes of what is asked of it: failed where a stance is ``bad``, else what is unknown."""
    context = {feature: engine.fact(feature) for feature in asked}
    refused = [fact for fact in context.values() if fact.stance in bad]
    if refused:
        return _refused(engine, refused, asked)
    unsure = [fact for fact in context.values() if fact.stance is Stance.UNKNOWN]
    if unsure:
        return unknown(_told(engine, unsure, asked), help=unsure[0].help, engine=str(engine))
    return passed(good, engine=str(engine))


def _refused(engine: Engine, context: list[Fact], asked: _Asked) -> Observation:
    hard = [fact for fact in context if fact.flag is None]
    first = (hard or context)[0]
    advice = "; ".join(dict.fromkeys(filter(None, (_advice(fact) for fact in context))))
    figures: dict[str, Any] = {
        "engine": str(engine),
        "features": [fact.feature.value for fact in context],
        "sources": [fact.source for fact in context],
    }
    message = _told(engine, context, asked)
    if hard:
        return failed(message, where=asked[first.feature][0], help=advice, **figures)
    # It depends on how the server is started, which is not known here.
    return Observation(Severity.WARNING, message, asked[first.feature][0], advice, figures)


def _advice(fact: Fact) -> str | None:
    if fact.flag is None:
        return fact.help
    return ", ".join(filter(None, (f"start the server with {fact.flag}", fact.help)))


def _told(engine: Engine, context: Iterable[Fact], asked: _Asked) -> str:
    return "; ".join(f"{engine} {fact.says} ({some(asked[fact.feature])})" for fact in context)


@dataclass(frozen=True, slots=True)
class Scale:
    """What one module's update is multiplied by.

    Attributes:
        trained: in PEFT.
        served: by the engine.
    """

    trained: float
    served: float

    @property
    def ratio(self) -> float:
        return self.served / self.trained if self.trained else math.inf


def scales(saved: Saved, engine: Engine) -> dict[str, Scale] | Observation:
    """Module -> its scale in PEFT and in the engine; "unknown" where the engine's rule is not known.

    Source: ``peft.tuners.lora.layer.LoraLayer.update_layer``.
    """
    used = _scale_features(saved)
    context = {feature: engine.fact(feature) for feature in used}
    unsure = [fact for fact in context.values() if fact.stance is Stance.UNKNOWN]
    if unsure:
        return unknown("; ".join(f"{engine} {fact.says}" for fact in unsure), engine=str(engine))
    takes = {feature for feature, fact in context.items() if fact.stance is Stance.TAKES}
    rooted = bool(saved.file.config.get("use_rslora"))
    rank, alpha = saved.default_rank, saved.alpha("")
    found = {}
    for core in saved.modules:
        own_rank, own_alpha = saved.rank(core), saved.alpha(core)
        served_rank = own_rank if Feature.RANK_PATTERN in takes else rank
        served_alpha = own_alpha if Feature.ALPHA_PATTERN in takes else alpha
        served = _scale(served_alpha, served_rank, rooted and Feature.RSLORA in takes)
        found[core] = Scale(_scale(own_alpha, own_rank, rooted), served)
    return found


def _scale_features(saved: Saved) -> list[Feature]:
    config = saved.file.config
    asked = {
        Feature.RSLORA: config.get("use_rslora"),
        Feature.RANK_PATTERN: config.get("rank_pattern"),
        Feature.ALPHA_PATTERN: config.get("alpha_pattern"),
    }
    return [feature for feature, given in asked.items() if given]


def _scale(alpha: float, rank: int, rooted: bool) -> float:
    return alpha / (math.sqrt(rank) if rooted else rank)
