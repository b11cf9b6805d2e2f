"""``Guard``: a callback that checks a run before, during and after training, and stops one that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.rules import all_rules, check_settings
from graftkit.errors import GraftError
from graftkit.findings import Finding, Report, Severity
from graftkit.modeling.unwrapping import name_in_base, peft_model_of
from graftkit.planning.plan import Plan
from graftkit.recipes.settings import CheckSettings
from graftkit.report.chart import Curve
from graftkit.serving.sign import Signer
from graftkit.training.checkpointing.checkpoints import last_complete_checkpoint
from graftkit.training.distributed.collectives import check_on_first_process
from graftkit.training.guard.errors import (
    check_arguments,
    failed_preflight,
    no_adapter,
    not_finite,
    nothing_trains,
    wrong_checkpoint,
)
from graftkit.training.guard.log_findings import log_findings
from graftkit.training.guard.preflight import row_options, run_preflight
from graftkit.training.guard.row_counter import RowCounter, clipped
from graftkit.training.guard.saved_check import check_checkpoint
from graftkit.training.guard.step_monitor import StepMonitor, StepStats, curves_of
from graftkit.training.guard.tensor_stats import TensorActivity
from graftkit.training.guard.tracking import Trackers

if TYPE_CHECKING:
    from peft import PeftModel

# Measured steps before a tensor counts as untrained: on a LoRA's first step its A gets no gradient.
_PATIENCE = 3
# How often steps are measured where neither the caller nor the trainer's settings say so.
_EVERY = 10


class Guard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Guards a run of any TRL or transformers trainer: ``SFTTrainer(..., callbacks=[gk.Guard(plan)])``.

    Before the first step the rules that apply run on the model itself: those on versions, configuration, settings
    and processor, and those that try one real batch (gradients with and without activation checkpointing, cache,
    packing, accumulation, token types, clamps). The four that merge, reload or copy the model (GK115, GK508,
    GK601, GK607) are left to ``graft verify``: on a large model they take minutes and the memory of a second one.
    The run is then the same as without the guard, bit for bit.

    On the steps that log, it measures gradients, updates and the share of clamped activations per tower, and stops
    the run if the loss, a gradient or a weight is no longer finite, or if gradients change nothing. It counts the
    rows that are as long as ``max_length``, and those without a token to learn. The figures go to TensorBoard, W&B
    and trackio too, as ``graftkit/…``, where the trainer reports to them (``report_to``). In half precision with a
    loss scale (fp16) a gradient may overflow: the trainer then skips the step.

    At every save, the file is read back and compared with the adapter in memory, bit for bit; ``graftkit.json``
    beside it says which base and tokenizer it has, and what the model answers (``gk.sign``). For parameters that
    are sharded over processes (FSDP, ZeRO-3) names and shapes are compared, and rules that need a forward pass
    stay unknown. The checks run on the first process; the others stop with it.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        *,
        settings: CheckSettings | None = None,
        every: int | None = None,
        rows: Any = None,
    ) -> None:
        """
        Args:
            plan: what was attached; the rules then also report what a configuration misses or reaches beyond it.
            settings: which rules, with which limits.
            every: measure every so many steps; None for the steps that log.
            rows: the training data as the trainer gets it, before it tokenizes and cuts it. With it GK214 says
                what ``max_length`` takes; without it, which rows are as long as that, and how many were dropped.

        Raises:
            TrainingError: ``guard-argument``: an argument is of another type.
            RecipeError: ``settings``: they name an unknown rule.
        """
        check_arguments(plan=(plan, Plan), settings=(settings, CheckSettings), every=(every, int))
        self._plan = plan
        self._settings = settings or CheckSettings()
        check_settings(self._settings)
        self._every = every
        self._rows = rows
        self._before = Report(())
        self._during: dict[str, Finding] = {}
        self._saved = Report(())
        self._monitor: StepMonitor | None = None
        self._counter: RowCounter | None = None
        self._clipped: list[float] = []
        self._trackers = Trackers([], "")
        self._learns = True
        self._last_good: Path | None = None
        self._last_save: int | None = None
        self._signer = Signer()

    @property
    def report(self) -> Report:
        """The findings before the first step, during training, and of the last save."""
        return Report((*self._before, *self._during.values(), *self._saved))

    @property
    def steps(self) -> tuple[StepStats, ...]:
        """The measured steps of the last run, in order."""
        return tuple(self._monitor.steps) if self._monitor is not None else ()

    @property
    def curves(self) -> Mapping[str, tuple[Curve, ...]]:
        """Title -> a curve for each tower, over the measured steps."""
        return curves_of(self.steps)

    def on_train_begin(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Run the rules; start measuring.

        Raises:
            TrainingError: ``guard``: a rule found an error; ``no-adapter``.
        """
        model = peft_model_of(given.get("model"))
        if model is None:
            raise no_adapter(given.get("model"))
        if self._monitor is not None:  # an earlier run may have ended within a step
            self._monitor.stop()
        self._stop_counting()
        self._before, self._during, self._saved, self._last_save = Report(()), {}, Report(()), None
        self._last_good = last_complete_checkpoint(Path(args.output_dir)) if state.global_step else None
        check_on_first_process(lambda: self._check_before(model, args, given))
        self._monitor = StepMonitor(model, hooks=not args.torch_compile)
        self._trackers = Trackers(args.report_to if state.is_world_process_zero else [], args.output_dir)
        self._counter, self._clipped = None if args.torch_compile else RowCounter(model, row_options(args)), []

    def on_step_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Prepare to measure the step, where it is one to be measured."""
        step, every = state.global_step + 1, self._every or state.logging_steps or _EVERY
        if self._monitor is not None and (step % every == 0 or (step == 1 and args.logging_first_step)):
            self._monitor.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Measure the gradients.

        Raises:
            TrainingError: ``not-finite``: a gradient, and the trainer will not skip the step.
        """
        if self._monitor is None or not self._monitor.active:
            return
        nonfinite = self._monitor.gradients()
        self._learns = not nonfinite and _learning_rate(given.get("optimizer")) > 0
        if nonfinite and not args.fp16:
            raise not_finite("gradient", nonfinite, state.global_step + 1, self._last_good)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Measure what the step did to the adapter.

        Raises:
            TrainingError: ``not-finite`` (a weight), or ``nothing-trains``.
        """
        if self._monitor is None or not self._monitor.active:
            return
        nonfinite = self._monitor.end(state.global_step, learns=self._learns)
        if nonfinite:
            raise not_finite("weight", nonfinite, state.global_step, self._last_good)
        activity = self._monitor.activity
        if activity.steps >= _PATIENCE and activity.nothing_changes:
            raise nothing_trains(activity.steps, state.global_step)
        if state.is_world_process_zero:
            self._check_saturation(self._monitor)

    def on_log(self, args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Check what is logged.

        Raises:
            TrainingError: ``not-finite``: the loss, or the norm of the gradients.
        """
        if self._monitor is None:
            return
        logged = {n: v for n in ("loss", "grad_norm") if isinstance(v := (logs or {}).get(n), (int, float))}
        if isinstance(share := (logs or {}).get("completions/clipped_ratio"), (int, float)):
            self._clipped.append(share)
        skipped = ("grad_norm",) if args.fp16 else ()
        nonfinite = tuple(n for n, v in logged.items() if not math.isfinite(v) and n not in skipped)
        if nonfinite:
            raise not_finite("logged value", nonfinite, state.global_step, self._last_good)
        if "grad_norm" in logged:
            self._monitor.unclip(state.global_step, logged["grad_norm"])
        self._trackers.write(self._monitor.steps)

    def on_save(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Compare the checkpoint with the adapter in memory, and write beside it what it should answer.

        Raises:
            TrainingError: ``saved-adapter``: they differ.
        """
        if self._monitor is None or state.is_hyper_param_search:  # a search saves elsewhere
            return
        self._last_save = state.global_step
        folder = self._check_checkpoint(args, state, self._monitor.model)
        if state.is_world_process_zero:
            self._signer.sign(self._monitor.model, given.get("processing_class"), folder)

    def on_train_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Compare the checkpoint of the last step once more; report the tensors that were never trained.

        Raises:
            TrainingError: ``saved-adapter``: they differ.
        """
        self._stop_counting()
        self._trackers.close()
        if self._monitor is None:
            return
        if self._last_save == state.global_step and not args.load_best_model_at_end:
            self._check_checkpoint(args, state, self._monitor.model)
        if state.is_world_process_zero and self._monitor.activity.steps >= _PATIENCE:
            self._report_once(_rule("GK203"), _observed(self._monitor.activity))
        if state.is_world_process_zero and (rows := self._counted()) is not None:
            self._report_once(_rule("GK214"), rows)

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.stop()

    def _counted(self) -> Observation | None:
        """Return what was seen of the rows, or of the completions, of this process; None where nothing was."""
        allowed = _rule("GK214").limit(self._settings, "clipped")
        if self._clipped or self._counter is None:
            return clipped(self._clipped, allowed)
        before = [f for f in self._before if f.code == "GK214" and f.severity is Severity.OK]
        whole = any(f.evidence.get("rows") == f.evidence.get("rows_in_data") for f in before)
        return self._counter.observed(none_is_cut=whole)

    def _check_before(self, model: PeftModel, args: Any, given: Mapping[str, Any]) -> GraftError | None:
        processor, loader = given.get("processing_class"), given.get("train_dataloader")
        self._before = run_preflight(
            model,
            args,
            plan=self._plan,
            settings=self._settings,
            processor=processor,
            loader=loader,
            rows=self._rows,
        )
        log_findings(self._before)
        return failed_preflight(self._before)

    def _check_checkpoint(self, args: Any, state: Any, model: PeftModel) -> Path:
        """Compare the checkpoint of this step with memory, and return its folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def compare() -> GraftError | None:
            known = {(finding.code, finding.message) for finding in self._saved}
            self._saved = check_checkpoint(folder, model, self._settings)
            log_findings(finding for finding in self._saved if (finding.code, finding.message) not in known)
            return wrong_checkpoint(self._saved, folder, self._last_good)

        check_on_first_process(compare)
        self._last_good = folder
        return folder

    def _check_saturation(self, monitor: StepMonitor) -> None:
        rule, grown = _rule("GK306"), monitor.grown_saturation
        allowed = rule.limit(self._settings, "increase")
        worst = max(grown, key=lambda path: grown[path], default=None)
        if worst is not None and grown[worst] > allowed:
            message = f"since training began, {100 * grown[worst]:.1f} % more of its activations are clamped"
            observed = failed(message, where=worst, worst_increase=grown[worst], allowed_increase=allowed)
            self._report_once(rule, observed)

    def _report_once(self, rule: Rule, observed: Observation) -> None:
        """Keep the first observation of a rule as a warning, which does not stop the run."""
        if not self._settings.wants(rule.code) or rule.code in self._during:
            return
        finding = rule.finding(observed, Severity.WARNING)
        self._during[rule.code] = replace(finding, title=f"{finding.title}, while training")
        log_findings([self._during[rule.code]])


def _observed(activity: TensorActivity) -> Observation:
    tensors, untrained = len(activity.names), activity.untrained
    steps = f"{activity.steps} measured steps"
    if not untrained:
        return passed(f"all {tensors} tensors were trained on {steps}", tensors=tensors, dead=0)
    return failed(
        f"{len(untrained)} of {tensors} tensors had no gradient on {steps}, or are still the zeros they began as",
        where=name_in_base(untrained[0]),
        help="leave them out of the targets, or add data that feeds them; equal rewards train nothing",
        tensors=tensors,
        dead=len(untrained),
        watched_steps=activity.steps,
    )


def _learning_rate(optimizer: Any) -> float:
    """Return the largest learning rate, 0 where it is not known: such a step cannot show that nothing learns."""
    return max((float(group.get("lr", 0)) for group in getattr(optimizer, "param_groups", ())), default=0.0)


def _rule(code: str) -> Rule:
    return next(rule for rule in all_rules() if rule.code == code)
