"""Map + intent -> Plan: a stock PEFT configuration, a reason per site, coverage and cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.planning.cost import Memory, memory_of, trainable_params
from graftkit.planning.coverage import CoverageRow, coverage_of
from graftkit.planning.intent import read_intent
from graftkit.planning.matching import matched_by, rewritten_names, smallest_exact
from graftkit.planning.methods import Method, build_config, check_numbers, method_named
from graftkit.planning.select import select
from graftkit.surveying.sites import SCHEMA_VERSION, ModelMap, Site
from graftkit.surveying.walk import survey

if TYPE_CHECKING:
    from peft import PeftConfig


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
            "trainable_params": self.trainable_params,
            "memory": self.memory.to_dict(),
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
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    allow_unmatched: bool = False,
    **options: Any,
) -> Plan:
    """Turn what the user means into a PEFT configuration that does exactly that on this model.

    Args:
        model: a ``ModelMap``, or anything ``survey`` takes.
        targets: ``"all-linear"``, roles ("attention", "mlp", "experts", "embeddings", "head", "router"),
            module names (in a tower, the wrapper's name means its inner linear), or regular expressions.
        scope: the towers to adapt ("language", "vision", "audio", …, or "all"). None: those every batch feeds.
        method: "lora", "dora" or "rslora".
        r: rank.
        alpha: numerator of the scale; None means ``r``, a scale of 1.
        dropout: on the adapter's input, 0 to 1.
        allow_unmatched: list targets that name nothing in ``Plan.unmatched`` instead of failing.
        options: further fields of PEFT's configuration class, passed on as they are.

    Raises:
        PlanError: the request cannot be met exactly; its code says why.
        SourceError, BuildError: the model cannot be surveyed.
    """
    chosen_method = method_named(method)
    check_numbers(r, alpha, dropout)
    model_map = model if isinstance(model, ModelMap) else survey(model)
    intent = read_intent(model_map, targets, scope)
    selection = select(model_map, intent, allow_unmatched=allow_unmatched)
    attached = _route(model_map, selection.chosen)
    config = _config(model_map, attached, chosen_method, r, alpha, dropout, options)
    trainable = trainable_params((a.site for a in attached), r=r, dora=bool(chosen_method.options.get("use_dora")))
    return Plan(
        model=model_map,
        peft_config=config,
        attached=attached,
        skipped=tuple(Skipped(site, reason) for site, reason in selection.skipped),
        unmatched=selection.unmatched,
        targets=intent.targets,
        scope=intent.scope,
        method=method,
        trainable_params=trainable,
        memory=memory_of(model_map.model.params, trainable),
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


def _config(
    model_map: ModelMap,
    attached: tuple[Attached, ...],
    method: Method,
    r: int,
    alpha: float | None,
    dropout: float,
    options: dict[str, Any],
) -> PeftConfig:
    modules = [a.path for a in attached if a.via == "target_modules"]
    parameters = [_parameter_path(a.site) for a in attached if a.via == "target_parameters"]
    rewritten = rewritten_names(model_map.model.model_type)
    return build_config(
        method,
        target_modules=smallest_exact(modules, model_map.module_paths, regex_is_safe=not rewritten),
        target_parameters=_parameter_targets(parameters, model_map.parameter_paths),
        task_type=model_map.model.task_type,
        r=r,
        alpha=r if alpha is None else alpha,
        dropout=dropout,
        options=options,
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
