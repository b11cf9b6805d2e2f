"""Map + intent -> Plan: a stock PEFT configuration, a reason per site, coverage and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit._version import SCHEMA_VERSION
from graftkit.errors import PlanError
from graftkit.planning.config.build import build_config, config_dict
from graftkit.planning.config.extras import parameter_sizes, saved_modules
from graftkit.planning.config.hyperparameters import check_values, field_values, values_text
from graftkit.planning.config.methods import Method, method_named, refusal_of
from graftkit.planning.config.options import check_options
from graftkit.planning.cost import Memory, memory_of, planned_params
from graftkit.planning.coverage import CoverageRow, LayerReach, coverage_of, layers_reached
from graftkit.planning.decisions import Attached, Caution, LeftAlone, PlanWarning, Shortfall, Skipped, Unmet
from graftkit.planning.narrow import too_narrow
from graftkit.planning.quantization import QuantizationPlan, check_bits, plan_quantization
from graftkit.planning.selection.select import read_intent, select
from graftkit.planning.selection.target_names import is_role
from graftkit.planning.text import plan_text
from graftkit.planning.trials.small_layer import check_initializer, refusal_when_quantized
from graftkit.progress import Progress
from graftkit.surveying.checkpoint.complete import check_complete
from graftkit.surveying.sites import ModelMap, Site
from graftkit.surveying.survey import survey
from graftkit.text import some
from graftkit.twins.reaching.known import Reach, reach_of

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class Plan:
    """What will be adapted, what will not, and why.

    Attributes:
        model: the map it was made for.
        peft_config: a stock PEFT configuration, exact for this model.
        attached: the sites it adapts.
        skipped: the other sites, each with a reason.
        unmet: the targets that adapt nothing, and why: roles that the architecture lacks or that cannot be
            adapted, and where that was allowed names.
        targets: what the user asked for, as written.
        scope: the towers, and the paths of modules, that it was resolved in.
        method: the method's name.
        trainable_params: elements that will be trained.
        memory: bytes that training needs besides activations.
        reach: which sites no gradient reaches, and how that is known.
        warnings: about what is adapted as asked, and will not do what one expects.
        quantization: what quantizing the base reaches and leaves, where that was asked for.
    """

    model: ModelMap = field(repr=False)
    peft_config: PeftConfig
    attached: tuple[Attached, ...] = field(repr=False)
    skipped: tuple[Skipped, ...] = field(repr=False)
    unmet: tuple[Unmet, ...]
    targets: tuple[str, ...]
    scope: tuple[str, ...]
    method: str
    trainable_params: int
    memory: Memory
    reach: Reach
    warnings: tuple[PlanWarning, ...] = ()
    quantization: QuantizationPlan | None = None

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The configuration to load the base with, naming what to skip; None where none was asked for."""
        return self.quantization.config if self.quantization else None

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The targets that name nothing in scope, as the user wrote them."""
        return tuple(unmet.target for unmet in self.unmet if not unmet.exists)

    @cached_property
    def layers(self) -> tuple[LayerReach, ...]:
        """Per tower: how many of its layers carry an adapter."""
        return layers_reached(self.model, {a.path for a in self.attached})

    @cached_property
    def coverage(self) -> tuple[CoverageRow, ...]:
        """Per tower and role: present, adapted, and why not."""
        return coverage_of(self.model, self.attached, self.skipped)

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
            "unmet": [unmet.to_dict() for unmet in self.unmet],
            "reach": self.reach.to_dict(),
            "warnings": [warning.to_dict() for warning in self.warnings],
            "coverage": [row.to_dict() for row in self.coverage],
            "layers": [asdict(row) for row in self.layers],
            "trainable_params": self.trainable_params,
            "memory": self.memory.to_dict(),
            "quantization": self.quantization.to_dict() if self.quantization else None,
        }

    def __str__(self) -> str:
        hyperparameters = values_text(method_named(self.method), self.peft_config)
        text = plan_text(self.to_dict(), hyperparameters)
        return f"{text}\n\n{self.quantization}" if self.quantization else text


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
    strict: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Plan:
    """Turn what the user means into a PEFT configuration that does exactly that on this model.

    Args:
        model: a ``ModelMap``, or anything ``survey`` takes.
        targets: ``"all-linear"``, roles ("attention", "mlp", "experts", "embeddings", "head", "router"),
            module names (in a tower, the wrapper's name means its inner linear), or regular expressions.
            ``"all-linear"`` and roles leave out what no gradient reaches (a pooler that the loss does not read, an
            indexer that only ranks), as far as that is known; a name adapts it, with a warning.
        scope: what to adapt: towers ("language", "vision", "audio", …, or "all"), or modules by their paths. None:
            the towers that every batch feeds. Modules of no known tower are adapted where the scope has "unknown"
            or their paths; a scope of towers alone is refused where the targets also name some of those.
        method: "lora", "dora", "rslora", or any method of PEFT that adapts layers, by its name in lower case.
        r: rank; None means 16 for LoRA and PEFT's default for other methods.
        alpha: numerator of the scale; None means ``r`` for LoRA, a scale of 1, and for other methods what keeps
            PEFT's ratio of the two.
        dropout: on the adapter's input, 0 to 1; None means none.
        quantization: "4bit" or "8bit" to plan for a base that bitsandbytes quantizes: ``Plan.quantization`` then
            says what stays in 16 bit and what that costs, ``Plan.quantization_config`` what to load it with.
        allow_unmatched: pass over names that reach nothing, and list them in ``Plan.unmet``, instead of failing.
        strict: fail over a role that this model lacks, or that no adapter can go on, which is passed over and
            listed in ``Plan.unmet`` otherwise.
        on_progress: called while a twin is asked which weights get a gradient, where that is not known.
        options: further fields of PEFT's configuration class (``options:`` in a recipe). Keys of ``rank_pattern``
            and the like may be towers, roles or the names ``targets`` takes; the rest is passed on as it is.

    Raises:
        PlanError: the request cannot be met exactly; its code says why.
        SourceError, BuildError: the model cannot be surveyed, or its files lack weights (``weights-incomplete``).
        MissingDependencyError: PEFT, or what it imports where it is installed, cannot be imported.
    """
    check_request(method, r=r, alpha=alpha, dropout=dropout, quantization=quantization, **options)
    chosen_method = method_named(method)
    hyperparameters = field_values(chosen_method, r, alpha, dropout)
    model_map = model if isinstance(model, ModelMap) else _survey(model)
    intent = read_intent(model_map, targets, scope)
    reach = reach_of(model_map, on_progress)
    selection = select(model_map, intent, reach.unreached, allow_unmatched=allow_unmatched, strict=strict)
    attached, refused, unmet = _accepted(chosen_method, selection.attached, strict=strict)
    skipped = {s.path: s for s in (*selection.skipped, *refused)}
    config = build_config(model_map, attached, chosen_method, hyperparameters, options)
    if narrow := {s.path: s for s in too_narrow(config, attached)}:
        attached, skipped = tuple(a for a in attached if a.path not in narrow), skipped | narrow
        config = build_config(model_map, attached, chosen_method, hyperparameters, options)
    check_initializer(config, [a.site for a in attached if a.via == "target_modules"])
    trainable = planned_params(config, model_map, attached, parameter_sizes(model_map, model))
    quantized = plan_quantization(model_map, quantization) if quantization is not None else None
    base_bytes = quantized.total_bytes if quantized else 2 * model_map.model.params
    return Plan(
        model=model_map,
        peft_config=config,
        attached=attached,
        skipped=tuple(skipped[site.path] for site in model_map if site.path in skipped),
        unmet=(*selection.unmet, *unmet),
        targets=intent.targets,
        scope=intent.scope.names,
        method=method,
        trainable_params=trainable,
        memory=memory_of(base_bytes, trainable),
        reach=reach,
        warnings=(*selection.warnings, *_faults(model_map, attached, config), *_heads(model_map, config)),
        quantization=quantized,
    )


def check_request(
    method: str = "lora",
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    quantization: str | None = None,
    **options: Any,
) -> None:
    """Check what can be said of a request without its model, as the arguments of :func:`plan`.

    Raises:
        PlanError: a method, an option, a value or a quantization that no model could be planned with.
        MissingDependencyError: PEFT cannot be imported.
    """
    check_values(r, alpha, dropout)
    if quantization is not None:
        check_bits(quantization)
    chosen = method_named(method)
    field_values(chosen, r, alpha, dropout)
    check_options(chosen, options)


def _survey(model: Any) -> ModelMap:
    found = survey(model)
    check_complete(found.checkpoint, found.model.name)
    return found


def _accepted(
    method: Method, chosen: Sequence[Attached], *, strict: bool
) -> tuple[tuple[Attached, ...], list[Skipped], list[Unmet]]:
    """Split the chosen sites into those that the method can adapt, and the others, with the roles it cannot.

    Raises:
        PlanError: ``method-kind`` when the method can adapt nothing that one of the targets names; where that is a
            role, only if strict or nothing is left.
    """
    refusals = {a.path: _refusal(method, a) for a in chosen}
    accepted = tuple(a for a in chosen if not refusals[a.path])
    unmet = []
    for target in dict.fromkeys(a.target for a in chosen):
        named = [a for a in chosen if a.target == target]
        if any(refusals[a.path] is None for a in named):
            continue
        if strict or not accepted or not is_role(target):
            raise _no_method(method, named, refusals[named[0].path])
        reasons = "; ".join(dict.fromkeys(str(refusals[a.path]) for a in named))
        sites = [a.site for a in named]
        unmet.append(Shortfall.NOT_BY_METHOD.of(target, sites, method=method.name, reasons=reasons))
    refused = [a.site for a in chosen if refusals[a.path]]
    skipped = [LeftAlone.NOT_BY_METHOD.skip(site, method=method.name, kind=_kind(site)) for site in refused]
    return accepted, skipped, unmet


def _faults(model_map: ModelMap, attached: Sequence[Attached], config: PeftConfig) -> list[PlanWarning]:
    """Return the known faults of others that the adapter would meet on these sites."""
    paths = {a.path for a in attached}
    met = {
        found.fault: [path for path in found.sites if path in paths]
        for found in model_map.faults
        if config.peft_type == "LORA" or not found.fault.of_lora_alone
    }
    return [Caution.FAULT.about(on, says=fault.says, page=fault.page) for fault, on in met.items() if on]


def _heads(model_map: ModelMap, config: PeftConfig) -> list[PlanWarning]:
    """Return a warning for each output layer of a live model that may be new, and that the adapter does not hold.

    Output embeddings come with the base. What classifies or scores is often initialized at random, and only who
    loaded the model knows; files are asked by ``check_complete``.
    """
    if model_map.model.origin != "live model" or any(site.role == "lm_head" for site in model_map):
        return []
    names = getattr(config, "modules_to_save", None) or ()
    saved = tuple(f"{path}." for name in names for path in saved_modules(model_map, name))
    others = [f"{site.path}." for site in model_map if site.tower != "head"]
    heads: dict[str, list[str]] = {}
    for site in model_map:
        if site.tower == "head" and not f"{site.path}.".startswith(saved):
            heads.setdefault(_without_others(site.path, others), []).append(site.path)
    return [Caution.HEAD_NOT_SAVED.about(sites, name=path.rpartition(".")[2]) for path, sites in heads.items()]


def _without_others(path: str, others: Sequence[str]) -> str:
    """Return the outermost module around a path that contains none of the others, which end in a dot."""
    parts = path.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in outer if not any(o.startswith(f"{module}.") for o in others)), path)


def _no_method(method: Method, named: Sequence[Attached], why: str | None) -> PlanError:
    return PlanError(
        f"{method.name} cannot adapt {_kind(named[0].site)} sites",
        where=some([a.path for a in named], 1),
        why=why,
        help="leave them out of the targets, or use the method lora",
        code="method-kind",
    )


def _refusal(method: Method, attached: Attached) -> str | None:
    site = attached.site
    kind = "parameter" if attached.via == "target_parameters" else site.kind
    refusal = refusal_of(method, kind, len(site.shape))
    if refusal is None and site.quantized is not None:
        return refusal_when_quantized(method.name, site.quantized)
    return refusal


def _kind(site: Site) -> str:
    kind = site.kind.replace("_", " ")
    return f"{kind} ({site.quantized})" if site.quantized else kind
