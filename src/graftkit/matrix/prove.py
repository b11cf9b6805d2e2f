"""``prove()``: one family, one method, and what each check comes to."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach
from graftkit.attaching.initialize import initialize
from graftkit.checks.probes.checkpointing import can_checkpoint
from graftkit.checks.probes.live_adapter import perturbed
from graftkit.checks.probes.text_batches import generates, reason_without_text
from graftkit.checks.verify import verify
from graftkit.errors import PlanError
from graftkit.findings import Finding
from graftkit.matrix.cell import Cell, Check, Outcome, Verdict
from graftkit.matrix.trials.methods import MatrixMethod, matrix_method
from graftkit.matrix.trials.moved_base import identity, reload
from graftkit.matrix.trials.origin import made_from, versions
from graftkit.matrix.trials.outcomes import guarded, of_finding, of_fresh, together
from graftkit.matrix.trials.subject import Subject, prepare
from graftkit.planning.decisions import LeftAlone
from graftkit.planning.plan import Plan, plan
from graftkit.progress import Progress
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.example_batch import example_batch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The rules that decide a check; "attach" and "4-bit" also need that PEFT attached what was planned.
_FRESH, _RELOADED = "GK115", "GK508"
_RULES: Mapping[Check, tuple[str, ...]] = {
    Check.ATTACH: (_FRESH,),
    Check.GRADIENTS: ("GK203",),
    Check.MERGE: ("GK601", "GK607"),
    Check.RELOAD: (_RELOADED,),
    Check.CHECKPOINTING: ("GK202",),
    Check.CACHE: ("GK201",),
    Check.PACKING: ("GK205",),
    Check.FOUR_BIT: (_FRESH, "GK203", _RELOADED),
}
_TARGETS = ("all-linear", "experts")
_BATCHES = 2
_NOT_REBUILT = Outcome(
    Verdict.REFUSED,
    "stock PEFT does not move the original base again: the adapter has to be saved as plain LoRA",
    (_RELOADED,),
)


def prove(
    model_type: str, method: str = "lora", checks: Iterable[Check] = tuple(Check), *, seed: int = 0
) -> tuple[Cell, ...]:
    """Try a method on the twin of a family.

    The plan is of every linear and every expert, and exactly that is attached; rules decide the rest. Nothing that
    goes wrong is raised: each check has a cell.

    Args:
        model_type: as transformers names it.
        method: as ``matrix_methods()`` names it.
        checks: which cells to return; what these need is tried all the same.
        seed: of the twin, its batch and its adapter.

    Raises:
        PlanError: ``method-unknown``.
    """
    return prove_method(prepare(model_type, seed=seed), method, checks)


def prove_method(subject: Subject, method: str, checks: Iterable[Check] = tuple(Check)) -> tuple[Cell, ...]:
    """Try a method on a family's twin, as ``prove`` does. The twin is not changed."""
    import torch

    wanted = tuple(check for check in Check if check in set(checks))
    chosen = matrix_method(method)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(subject.seed)  # PEFT draws the adapter's weights from the global generator
        outcomes = _Trial(subject, chosen).outcomes(wanted)
    return tuple(_cell(subject, method, check, outcomes[check]) for check in wanted)


class _Trial:
    """One method on one family: the checks in order, each with what those before it made."""

    def __init__(self, subject: Subject, method: MatrixMethod) -> None:
        self._subject = subject
        self._method = method
        self._left_out: tuple[str, ...] = ()

    def outcomes(self, wanted: tuple[Check, ...]) -> dict[Check, Outcome]:
        """Return the outcome of each wanted check, and of those that it needed."""
        found = {Check.TWIN: self._subject.outcome}
        if (twin := self._subject.twin) is None:
            return {**dict.fromkeys(wanted, _not_reached(Check.TWIN, self._subject.outcome)), **found}
        made: dict[str, Any] = {}

        def planned() -> Outcome:
            made["plan"] = self._plan(twin)
            return self._of_plan(made["plan"])

        def attached() -> Outcome:
            made["adapted"] = self._attached(copy.deepcopy(twin), made["plan"])
            return Outcome(Verdict.PROVEN, "PEFT attached exactly what was planned")

        for check, run in ((Check.PLAN, planned), (Check.ATTACH, attached)):
            found[check] = _timed(run)
            if found[check].verdict is not Verdict.PROVEN:
                return {**dict.fromkeys(wanted, _not_reached(check, found[check])), **found}
            if self._method.undecided is not None:
                undecided = Outcome(Verdict.UNKNOWN, self._method.undecided)
                return {**dict.fromkeys(wanted, undecided), **found}
        fresh = _timed(lambda: self._contract(Check.ATTACH, twin, made["adapted"]))
        found[Check.ATTACH] = fresh.after(fresh.seconds + found[Check.ATTACH].seconds)
        return found | self._on_the_adapted(made["adapted"], wanted)

    def _on_the_adapted(self, adapted: PeftModel, wanted: tuple[Check, ...]) -> dict[Check, Outcome]:
        """Try what an adapter that has an effect must do."""
        twin = self._subject.twin
        tried: dict[Check, Callable[[], Outcome]] = {
            Check.GRADIENTS: lambda: self._contract(Check.GRADIENTS, twin, adapted),
            Check.MERGE: lambda: self._contract(Check.MERGE, twin, adapted),
            Check.RELOAD: lambda: self._contract(Check.RELOAD, twin, adapted),
            Check.CHECKPOINTING: lambda: self._checkpointing(adapted),
            Check.CACHE: lambda: self._cache(adapted),
            Check.PACKING: lambda: self._packing(adapted),
            Check.FOUR_BIT: self._four_bit,
        }
        found = {}
        with perturbed(adapted):
            for check, run in tried.items():
                if check in wanted:
                    found[check] = _timed(run)
        return found

    # ---- plan and attach ----

    def _plan(self, model: PreTrainedModel) -> Plan:
        """Plan every linear and every expert; without the experts where an option cannot go on bare parameters."""
        options: dict[str, Any] = {"method": self._method.method, "allow_unmatched": True, **self._method.options}
        try:
            return plan(model, targets=_TARGETS, **options)
        except PlanError as error:
            if error.code not in {"expert-option", "initializer-kind"}:
                raise
        self._left_out = ("experts",)
        return plan(model, targets=_TARGETS[:1], **options)

    def _of_plan(self, made: Plan) -> Outcome:
        refused = [unmet.target for unmet in made.unmet if unmet.exists]
        left_out = sorted({*self._left_out, *refused})
        no_gradient = [s.path for s in made.skipped if s.cause is LeftAlone.NO_GRADIENT]
        figures = {
            "sites": len(made.attached),
            "trainable_params": made.trainable_params,
            **({"left_out": left_out} if left_out else {}),
            **({"no_gradient": no_gradient} if no_gradient else {}),
        }
        beside = f", and {' and '.join(left_out)} left out: the method cannot adapt them" if left_out else ""
        return Outcome(Verdict.PROVEN, f"{len(made.attached)} sites planned{beside}", evidence=figures)

    def _attached(self, model: PreTrainedModel, made: Plan) -> PeftModel:
        initializer = self._method.initializer
        if initializer is None or not initializer.needs_data:
            return attach(model, made)
        seeds = range(self._subject.seed, self._subject.seed + _BATCHES)
        return initialize(model, made, [example_batch(model, batch_size=8, seed=seed) for seed in seeds])

    # ---- the checks ----

    def _contract(self, check: Check, original: PreTrainedModel | None, adapted: PeftModel) -> Outcome:
        """Run the rules of a check; what they cannot know where the base was moved is known from the original."""
        initializer, batch = self._method.initializer, self._subject.batch or {}
        codes = _RULES[check]
        known: list[Outcome] = []
        if initializer is not None and initializer.moves_base and original is not None:
            if _FRESH in codes:
                known.append(identity(original, adapted, batch))
            if _RELOADED in codes:
                known.append(reload(original, adapted, batch) if initializer.rebuilt_on_load else _NOT_REBUILT)
            codes = tuple(code for code in codes if code not in (_FRESH, _RELOADED))
        return together([*known, *self._outcomes(adapted, codes)])

    def _checkpointing(self, adapted: PeftModel) -> Outcome:
        if not can_checkpoint(adapted):
            return Outcome(Verdict.NOT_APPLICABLE, "none of the model's layers can recompute its activations")
        # As TRL trains by default: recomputed, without re-entrance. The evidence has the other kind as well.
        return together(self._outcomes(adapted, _RULES[Check.CHECKPOINTING], Training()))

    def _cache(self, adapted: PeftModel) -> Outcome:
        if not generates(adapted.get_base_model()):
            return Outcome(Verdict.NOT_APPLICABLE, "the model generates nothing, so it has no cache")
        found = together(self._outcomes(adapted, _RULES[Check.CACHE]))
        if found.verdict is Verdict.PROVEN and "difference_of_next_token" not in found.evidence:
            return Outcome(Verdict.UNKNOWN, found.message, _RULES[Check.CACHE], found.evidence)
        return found

    def _packing(self, adapted: PeftModel) -> Outcome:
        reason = reason_without_text(adapted) or _needs_more_than_text(adapted.get_base_model())
        if reason is not None:
            return Outcome(Verdict.NOT_APPLICABLE, f"samples are not packed for this model: {reason}")
        outcome = together(self._outcomes(adapted, _RULES[Check.PACKING], Training(packing=True)))
        if outcome.verdict is Verdict.FAILED and "refusal" in outcome.evidence:
            return Outcome(Verdict.REFUSED, outcome.message, outcome.codes, outcome.evidence)
        return outcome

    def _four_bit(self) -> Outcome:
        base = self._subject.in_4_bit
        if base is None:
            return Outcome(Verdict.NOT_APPLICABLE, "the model has no linear that bitsandbytes quantizes")
        made = self._plan(base)
        if not any(attached.site.quantized for attached in made.attached):
            return Outcome(Verdict.REFUSED, "the method adapts none of the quantized linears", ("plan-empty",))
        adapted = self._attached(copy.deepcopy(base), made)
        return self._contract(Check.FOUR_BIT, base, adapted)

    def _outcomes(
        self, adapted: PeftModel, codes: tuple[str, ...], training: Training | None = None
    ) -> list[Outcome]:
        """Run rules, and return what each came to: on the fresh adapter as it is, then with an effect."""
        others = tuple(code for code in codes if code != _FRESH)
        fresh = [of_fresh(*row) for row in self._run(adapted, (_FRESH,))] if _FRESH in codes else []
        with perturbed(adapted) if fresh else nullcontext():
            found = self._run(adapted, others, training) if others else []
        return [*fresh, *(of_finding(*row) for row in found)]

    def _run(
        self, adapted: PeftModel, codes: tuple[str, ...], training: Training | None = None
    ) -> list[tuple[Finding, float]]:
        """Return what each rule found, and the seconds that took."""
        began: list[float] = []

        def note(_progress: Progress) -> None:
            began.append(time.monotonic())

        report = verify(
            adapted,
            self._subject.batch,
            training=training,
            settings=CheckSettings(select=codes),
            on_progress=note,
        )
        ended = [*began[1:], time.monotonic()]
        rows = zip(report, began, ended, strict=True)
        return [(finding, after - before) for finding, before, after in rows]


def _needs_more_than_text(base: Any) -> str | None:
    """Return which inputs other than tokens a model's forward cannot do without, or None."""
    parameters = inspect.signature(base.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [name for name in needed if name != "input_ids"]
    return f"its forward requires {', '.join(others)}" if others else None


def _timed(run: Callable[[], Outcome]) -> Outcome:
    began = time.monotonic()
    return guarded(run).after(time.monotonic() - began)


def _not_reached(check: Check, outcome: Outcome) -> Outcome:
    """Return the outcome of what comes after a check that did not go through."""
    inherited = {Verdict.REFUSED, Verdict.NOT_APPLICABLE}
    verdict = outcome.verdict if outcome.verdict in inherited else Verdict.UNKNOWN
    return Outcome(verdict, f"not reached: {check} {outcome.verdict}", outcome.codes)


def _cell(subject: Subject, method: str, check: Check, outcome: Outcome) -> Cell:
    return Cell(
        subject.model_type,
        subject.model_class,
        subject.modalities,
        method,
        check,
        outcome.verdict,
        outcome.message,
        outcome.codes,
        outcome.evidence,
        outcome.seconds,
        versions(),
        made_from(subject.model_type),
        subject.seed,
    )
