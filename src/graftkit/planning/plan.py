"""Map + intent -> Plan: a stock PEFT configuration, a reason per site, coverage and cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.config.extras import Sizes, check_extras, extra_params, parameter_sizes
from graftkit.planning.config.methods import (
    Method,
    build_config,
    check_numbers,
    dividing_sizes,
    method_named,
    numbers_of,
    refusal_of,
)
from graftkit.planning.cost import Memory, memory_of, refused, trainable_params
from graftkit.planning.coverage import CoverageRow, LayerReach, coverage_of, layers_reached
from graftkit.planning.initializers import default_config
from graftkit.planning.matching import matched_by, rewritten_names, smallest_exact, value_at
from graftkit.planning.quantization import QuantizationPlan, plan_quantization
from graftkit.planning.selection.intent import read_intent
from graftkit.planning.selection.patterns import rekey
from graftkit.planning.selection.select import select
from graftkit.planning.trials.skeleton import Slot, ask, slots_of
from graftkit.planning.trials.small_layer import check_initializer, refusal_when_quantized
from graftkit.surveying.sites import SCHEMA_VERSION, ModelMap, Site
from graftkit.surveying.survey import survey
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True, slots=True)
class Attached:
    """One site the plan adapts.

    Attributes:
        site: the site.
        via: the PEFT field that reaches it, "target_modules" or "target_parameters".
        reason: which of the user's targets it answers, and how.
    """

    site: Site
    via: str
    reason: str

    @property
    def path(self) -> str:
        return self.site.path

    def to_dict(self) -> dict[str, Any]:
        site = self.site
        return {
            "path": site.path,
            "tower": site.tower,
            "role": site.role,
            "via": self.via,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """One site the plan leaves alone, and why."""

    site: Site
    reason: str

    @property
    def path(self) -> str:
        return self.site.path

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.site.path, "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """What will be adapted, what will not, and why.

    Attributes:
        model: the map it was made for.
        peft_config: a stock PEFT configuration, exact for this model.
        attached: the sites it adapts.
        skipped: the other sites, each with a reason.
        unmatched: targets that named nothing (only where that was allowed).
        targets: what the user asked for, as written.
        scope: the towers it was resolved in.
        method: the method's name.
        trainable_params: elements that will be trained.
        memory: bytes that training needs besides activations.
        quantization: what quantizing the base reaches and leaves, where that was asked for.
    """

    model: ModelMap = field(repr=False)
    peft_config: PeftConfig
    attached: tuple[Attached, ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = field(repr=False)
    unmatched: tuple[str, ...]
    targets: tuple[str, ...]
    scope: tuple[str, ...]
    method: str
    trainable_params: int
    memory: Memory
    quantization: QuantizationPlan | None = None

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The configuration to load the base with, naming what to skip; None where none was asked for."""
        return self.quantization.config if self.quantization else None

    @cached_property
    def layers(self) -> tuple[LayerReach, ...]:
        """Per tower: how many of its layers carry an adapter."""
        return layers_reached(self.model, {a.path for a in self.attached})

    @cached_property
    def coverage(self) -> tuple[CoverageRow, ...]:
        """Per tower and role: present, adapted, and why not."""
        skipped = ((s.site, s.reason) for s in self.skipped)
        return coverage_of(self.model, (a.site for a in self.attached), skipped)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.model.to_dict(),
            "targets": list(self.targets),
            "scope": list(self.scope),
            "method": self.method,
            "peft_config": config_dict(self.peft_config),
            "attached": [a.to_dict() for a in self.attached],
            "skipped": [s.to_dict() for s in self.skipped],
            "unmatched": list(self.unmatched),
            "coverage": [row.to_dict() for row in self.coverage],
            "layers": [row.to_dict() for row in self.layers],
            "trainable_params": self.trainable_params,
            "memory": self.memory.to_dict(),
            "quantization": self.quantization.to_dict() if self.quantization else None,
        }

    def __str__(self) -> str:
        from graftkit.planning.text import plan_text

        return plan_text(self)


def plan(
    model: Any,
    *,
    targets: str | Iterable[str] = "all-linear",
    scope: str | Iterable[str] | None = None,
    method: str = "lora",
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    quantization: str | None = None,
    allow_unmatched: bool = False,
    **options: Any,
) -> Plan:
    """Turn what the user means into a PEFT configuration that does exactly that on this model.

    Args:
        model: a ``ModelMap``, or anything ``survey`` takes.
        targets: ``"all-linear"``, roles ("attention", "mlp", "experts", "embeddings", "head", "router"),
            module names (in a tower, the wrapper's name means its inner linear), or regular expressions.
        scope: the towers to adapt ("language", "vision", "audio", …, or "all"). None: those every batch feeds.
        method: "lora", "dora", "rslora", or any method of PEFT that adapts layers, by its name in lower case.
        r: rank; None means 16 for LoRA and PEFT's default for other methods.
        alpha: numerator of the scale; None means ``r`` for LoRA, a scale of 1, and for other methods what keeps
            PEFT's ratio of the two.
        dropout: on the adapter's input, 0 to 1; None means none.
        quantization: "4bit" or "8bit" to plan for a base that bitsandbytes packs: ``Plan.quantization`` then says
            what stays in 16 bit and what that costs, and ``Plan.quantization_config`` what to load it with.
        allow_unmatched: list targets that name nothing in ``Plan.unmatched`` instead of failing.
        options: further fields of PEFT's configuration class. Keys of ``rank_pattern`` and its kin may be towers,
            roles or the names ``targets`` takes; the rest is passed on as it is.

    Raises:
        PlanError: the request cannot be met exactly; its code says why.
        SourceError, BuildError: the model cannot be surveyed.
    """
    check_numbers(r, alpha, dropout)
    chosen_method = method_named(method)
    numbers = numbers_of(chosen_method, r, alpha, dropout)
    model_map = model if isinstance(model, ModelMap) else survey(model)
    intent = read_intent(model_map, targets, scope)
    selection = select(model_map, intent, allow_unmatched=allow_unmatched)
    attached, left_out = _accepted(chosen_method, _route(model_map, selection.chosen))
    skipped = [*(Skipped(site, reason) for site, reason in selection.skipped), *left_out]
    config = _config(model_map, attached, chosen_method, numbers, options)
    check_initializer(config, [a.site for a in attached if a.via == "target_modules"])
    trainable = _trainable(model_map, attached, config, parameter_sizes(model_map, model))
    packed = plan_quantization(model_map, quantization) if quantization is not None else None
    base_bytes = packed.total_bytes if packed else 2 * model_map.model.params
    return Plan(
        model=model_map,
        peft_config=config,
        attached=attached,
        skipped=_in_order(model_map, skipped),
        unmatched=selection.unmatched,
        targets=intent.targets,
        scope=intent.scope,
        method=method,
        trainable_params=trainable,
        memory=memory_of(base_bytes, trainable),
        quantization=packed,
    )


def _route(model_map: ModelMap, chosen: tuple[tuple[Site, str], ...]) -> tuple[Attached, ...]:
    """Decide the PEFT field that reaches each site."""
    rewritten = rewritten_names(model_map.model.model_type)
    routed = []
    for site, reason in chosen:
        taken = site.path.rpartition(".")[2] in rewritten
        via = "target_parameters" if site.kind == "parameter" or taken else "target_modules"
        routed.append(Attached(site, via, reason))
    return tuple(routed)


def _accepted(method: Method, routed: tuple[Attached, ...]) -> tuple[tuple[Attached, ...], list[Skipped]]:
    """The sites that the method can adapt, and the others with PEFT's reason.

    Raises:
        PlanError: ``method-kind`` when the method can adapt nothing that one of the targets names.
    """
    reasons = {a.path: _objection(method, a) for a in routed}
    for answer in dict.fromkeys(a.reason for a in routed):
        named = [a for a in routed if a.reason == answer]
        if all(reasons[a.path] for a in named):
            raise PlanError(
                f"{method.name} cannot adapt {_kind(named[0].site)} sites",
                where=some([a.path for a in named], 1),
                why=reasons[named[0].path],
                help="leave them out of the targets, or use method='lora'",
                code="method-kind",
            )
    kept = tuple(a for a in routed if not reasons[a.path])
    left_out = [
        Skipped(a.site, f"{method.name} cannot adapt {_kind(a.site)} sites") for a in routed if reasons[a.path]
    ]
    return kept, left_out


def _objection(method: Method, attached: Attached) -> str | None:
    site = attached.site
    kind = "parameter" if attached.via == "target_parameters" else site.kind
    refusal = refusal_of(method, kind, len(site.shape))
    if refusal is None and site.quantized is not None:
        return refusal_when_quantized(method, site.quantized)
    return refusal


def _kind(site: Site) -> str:
    kind = site.kind.replace("_", " ")
    return f"{kind} ({site.quantized})" if site.quantized else kind


def _in_order(model_map: ModelMap, skipped: list[Skipped]) -> tuple[Skipped, ...]:
    by_path = {s.path: s for s in skipped}
    return tuple(by_path[site.path] for site in model_map if site.path in by_path)


def _config(
    model_map: ModelMap,
    attached: tuple[Attached, ...],
    method: Method,
    numbers: Mapping[str, Any],
    options: dict[str, Any],
) -> PeftConfig:
    check_extras(model_map, options)
    modules = [a.site for a in attached if a.via == "target_modules"]
    parameters = [_parameter_path(a.site) for a in attached if a.via == "target_parameters"]
    rewritten = rewritten_names(model_map.model.model_type)
    given = {name: _rekeyed(method, name, value, model_map, attached) for name, value in options.items()}
    given |= default_config(options.get("init_lora_weights"), options)
    paths = [site.path for site in modules]
    targets = smallest_exact(paths, model_map.module_paths, regex_is_safe=not rewritten)
    parameter_targets = _parameter_targets(parameters, model_map.parameter_paths)

    def build(**derived: Any) -> PeftConfig:
        return build_config(
            method,
            target_modules=targets,
            target_parameters=parameter_targets,
            task_type=model_map.model.task_type,
            numbers=numbers,
            options=given,
            derived={**_derived(method, modules), **derived},
        )

    if method.dividing_field is None or method.dividing_field in numbers:
        return build()
    return _dividing(method, build, slots_of(model_map, modules), options)


def _dividing(method: Method, build: Any, slots: Sequence[Slot], options: Mapping[str, Any]) -> PeftConfig:
    """The configuration whose block size divides every planned layer: PEFT's default, or the next that does.

    Raises:
        PlanError: ``size-not-dividing`` for a size that the user chose.
    """
    name = str(method.dividing_field)
    if name in options:
        config: PeftConfig = build()
        why = _will_not_divide(config, slots)
        if why is None:
            return config
        fits = dividing_sizes(method, slots)
        raise PlanError(
            f"{name}={options[name]} does not divide every planned layer",
            where=method.config_class.__name__,
            why=why,
            help=f"{name}={fits[-1]} does, or leave it out",
            code="size-not-dividing",
        )
    for size in dividing_sizes(method, slots):
        config = build(**{name: size})
        why = _will_not_divide(config, slots)
        if why is None:
            return config
    raise refused(config, str(why))


def _will_not_divide(config: PeftConfig, slots: Sequence[Slot]) -> str | None:
    shapes = {(slot.kind, slot.shape): slot for slot in slots}
    answer = ask(config, list(shapes.values()))
    return answer.refusal or answer.adjusted


def _derived(method: Method, sites: Sequence[Site]) -> dict[str, Any]:
    """Fields that follow from the sites themselves."""
    derived: dict[str, Any] = {}
    if "feedforward_modules" in method.defaults:
        derived["feedforward_modules"] = _feedforward(sites)
    if "fan_in_fan_out" in method.defaults and sites and all(s.kind == "conv1d_transposed" for s in sites):
        derived["fan_in_fan_out"] = True
    return derived


def _feedforward(sites: Sequence[Site]) -> str | list[str]:
    """The layers whose input IA3 scales: where an MLP comes back to the model's width.

    A regular expression on the whole path: PEFT compares a list here without regard to dots.
    Source: ``peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING``.
    """
    down = [site.path for site in sites if site.role == "mlp.down"]
    if not down:
        return []
    found = smallest_exact(down, [site.path for site in sites])
    return found if isinstance(found, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, found))})"


def _rekeyed(method: Method, name: str, value: Any, model_map: ModelMap, attached: tuple[Attached, ...]) -> Any:
    if not name.endswith("_pattern") or not isinstance(value, Mapping):
        return value
    if "target_r" in method.defaults and name == "rank_pattern":
        raise PlanError(
            f"{method.name} writes rank_pattern itself, while it trains",
            help="leave it out; r sets the average rank that is kept",
            code="option-decided",
        )
    return rekey(name, value, model_map, [_as_matched(a) for a in attached])


def _as_matched(attached: Attached) -> Site:
    """The site under the path that PEFT matches patterns against."""
    if attached.via == "target_modules" or attached.site.kind == "parameter":
        return attached.site
    return replace(attached.site, path=_parameter_path(attached.site))


def _trainable(model_map: ModelMap, attached: tuple[Attached, ...], config: PeftConfig, sizes: Sizes) -> int:
    patterns = {f: v for f, v in vars(config).items() if f.endswith("_pattern") and isinstance(v, dict) and v}
    matched = [_as_matched(a).path for a in attached]
    groups = [tuple(str(value_at(pattern, path)) for pattern in patterns.values()) for path in matched]
    slots = slots_of(model_map, (a.site for a in attached))
    for name in patterns:
        if not name.startswith(_SCALE_PATTERNS):
            _check_obeyed(config, name, dict(zip(matched, slots, strict=True)))
    planned = [a.path for a in attached]
    return trainable_params(config, slots, groups) + extra_params(model_map, config, planned, sizes)


# Patterns of numbers that no tensor's size depends on.
_SCALE_PATTERNS = ("alpha_", "lambda_")


def _check_obeyed(config: PeftConfig, name: str, slots: Mapping[str, Slot]) -> None:
    """Refuse a pattern that a method's configuration takes and its layers do not look at.

    Raises:
        PlanError: ``pattern-ignored``.
    """
    without = copy(config)
    setattr(without, name, {})
    pattern: dict[str, Any] = getattr(config, name)
    usual = getattr(config, name.removesuffix("_pattern").replace("rank", "r"), None)
    slot = next((s for path, s in slots.items() if value_at(pattern, path) not in {None, usual}), None)
    if slot is None:
        return
    answers = ask(config, [slot]), ask(without, [slot])
    if None not in {a.trainable for a in answers} and answers[0].trainable == answers[1].trainable:
        raise PlanError(
            f"{type(config).__name__} takes {name}, and this version of PEFT does not use it",
            where=slot.path,
            why="a layer gets the same number of parameters with and without it",
            help="leave it out, or plan and attach each group of sites as an adapter of its own",
            code="pattern-ignored",
        )


def _parameter_path(site: Site) -> str:
    return site.path if site.kind == "parameter" else f"{site.path}.weight"


def _parameter_targets(planned: list[str], paths: tuple[str, ...]) -> list[str]:
    """Suffixes where they are exact, else full paths: PEFT reads no regular expression here."""
    targets = smallest_exact(planned, paths, regex_is_safe=False) if planned else []
    return sorted(planned) if sorted(matched_by(targets, paths)) != sorted(planned) else list(targets)


def config_dict(config: PeftConfig) -> dict[str, Any]:
    """A PEFT configuration as JSON-ready values, sets sorted and enumerations named."""
    return {key: _plain(value) for key, value in config.to_dict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "value", value) if not isinstance(value, str) else str(getattr(value, "value", value))
