"""``Guard``: a callback that looks before, during and after training, and stops a run that is going wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.rules import all_rules, check_settings
from graftkit.errors import GraftError, TrainingError
from graftkit.findings import Finding, Report, Severity
from graftkit.modeling.unwrapping import name_in_base
from graftkit.planning.plan import Plan
from graftkit.recipes.settings import CheckSettings
from graftkit.report.chart import Curve
from graftkit.text import some
from graftkit.training.checkpointing.checkpoints import last_whole_checkpoint
from graftkit.training.distributed.collectives import found_by_first
from graftkit.training.guard.log_findings import tell
from graftkit.training.guard.preflight import looked_at
from graftkit.training.guard.saved_check import read_back, refusal, told_good
from graftkit.training.guard.step_monitor import Course, curves_of
from graftkit.training.guard.tensor_stats import Lives, Point

if TYPE_CHECKING:
    from peft import PeftModel

# Watched steps before a tensor without a gradient is called untrained: the first of a LoRA brings its A none.
_PATIENCE = 3
# Where neither the caller nor the trainer's settings say how often.
_EVERY = 10


class Guard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Guards a run of any TRL or transformers trainer: ``SFTTrainer(..., callbacks=[gk.Guard(plan)])``.

    Before the first step the rules that apply run on the model itself: those on versions, configuration, settings
    and processor, and those that try one real batch (gradients with and without activation checkpointing, cache,
    packing, accumulation, token types, clamps). The four that merge, reload or copy the model (GK115, GK508,
    GK601, GK607) are left to ``graft verify``: on a large model they take minutes and the memory of a second one.
    The run is then the same as without the guard, bit for bit.

    On the steps that log, it notes gradients and updates per tower and the share of clamped activations, and stops
    the run where the loss, a gradient or a weight is no longer finite, or where gradients change nothing. In half
    precision with a loss scale (fp16) a gradient may overflow: the step is then skipped, and nothing is stopped.

    At every save, the file is read back and compared with the adapter in memory, bit for bit. Where the parameters
    are shared out over processes (FSDP, ZeRO-3) names and shapes are compared, and rules that need a forward pass
    stay unknown. The first process looks and speaks; the others stop with it.
    """

    def __init__(
        self, plan: Plan | None = None, *, settings: CheckSettings | None = None, every: int | None = None
    ) -> None:
        """
        Args:
            plan: what was attached. With it, what a configuration leaves or reaches is told too.
            settings: which rules, with which limits.
            every: watch every so many steps; None for the steps that log.

        Raises:
            RecipeError: ``settings``: they name what is no rule.
        """
        self._plan = plan
        self._settings = settings or CheckSettings()
        check_settings(self._settings)
        self._every = every
        self._begun: tuple[Finding, ...] = ()
        self._noted: dict[str, Finding] = {}
        self._saved: tuple[Finding, ...] = ()
        self._course: Course | None = None
        self._learns = True
        self._good: Path | None = None
        self._last_save: int | None = None

    @property
    def report(self) -> Report:
        """Everything found: before the first step, while training, and in the last save."""
        return Report((*self._begun, *self._noted.values(), *self._saved))

    @property
    def points(self) -> tuple[Point, ...]:
        """The watched steps of the last run, in order."""
        return tuple(self._course.points) if self._course is not None else ()

    @property
    def curves(self) -> Mapping[str, tuple[Curve, ...]]:
        """Title -> a curve for each tower, over the watched steps."""
        return curves_of(self.points)

    def on_train_begin(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Run the rules; start watching.

        Raises:
            TrainingError: ``guard``: a rule found an error; ``no-adapter``: there is nothing to guard.
        """
        model = _adapted(given.get("model"))
        if self._course is not None:  # a run before this one may have ended within a step
            self._course.stop()
        self._begun, self._noted, self._saved, self._last_save = (), {}, (), None
        self._good = last_whole_checkpoint(Path(args.output_dir)) if state.global_step else None
        _raise(found_by_first(lambda: self._look(model, args, given)))
        self._course = Course(model, hooks=not args.torch_compile)

    def on_step_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Prepare to watch the step, where it is one to be watched."""
        step, every = state.global_step + 1, self._every or state.logging_steps or _EVERY
        if self._course is not None and (step % every == 0 or (step == 1 and args.logging_first_step)):
            self._course.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Note the gradients.

        Raises:
            TrainingError: ``not-finite``: a gradient is not, and nothing will skip the step.
        """
        if self._course is None or not self._course.watching:
            return
        nonfinite = self._course.gradients()
        self._learns = not nonfinite and any(group["lr"] > 0 for group in _groups(given.get("optimizer")))
        if nonfinite and not args.fp16:
            raise self._not_finite("gradient", nonfinite, state.global_step + 1)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Note what the step did to the adapter.

        Raises:
            TrainingError: ``not-finite`` (a weight), or ``nothing-trains``.
        """
        if self._course is None or not self._course.watching:
            return
        nonfinite = self._course.end(state.global_step, learns=self._learns)
        if nonfinite:
            raise self._not_finite("weight", nonfinite, state.global_step)
        lives = self._course.watch.lives
        if lives.steps >= _PATIENCE and lives.stuck:
            raise _nothing_trains(lives, state.global_step)
        if state.is_world_process_zero:
            self._note_saturation(self._course)

    def on_log(self, args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Look at what is logged.

        Raises:
            TrainingError: ``not-finite``: the loss, or the norm of the gradients.
        """
        logged = {n: v for n in ("loss", "grad_norm") if isinstance(v := (logs or {}).get(n), (int, float))}
        nonfinite = tuple(
            n for n, v in logged.items() if not math.isfinite(v) and not (args.fp16 and n == "grad_norm")
        )
        if nonfinite and self._course is not None:
            raise self._not_finite("logged value", nonfinite, state.global_step)
        if "grad_norm" in logged and self._course is not None:
            self._course.unclip(state.global_step, logged["grad_norm"])

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Read the checkpoint back.

        Raises:
            TrainingError: ``saved-adapter``: it is not the adapter in memory.
        """
        if self._course is None or state.is_hyper_param_search:  # a search saves elsewhere
            return
        self._last_save = state.global_step
        self._compare(args, state, self._course.model)

    def on_train_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Read the checkpoint of the last step once more; say which tensors were never trained.

        Raises:
            TrainingError: ``saved-adapter``: it is not the adapter in memory.
        """
        if self._course is None:
            return
        if self._last_save == state.global_step and not args.load_best_model_at_end:
            self._compare(args, state, self._course.model)
        if state.is_world_process_zero:
            self._note_dead(self._course.watch.lives)

    def _look(self, model: PeftModel, args: Any, given: Mapping[str, Any]) -> GraftError | None:
        self._begun = looked_at(
            model,
            args,
            plan=self._plan,
            settings=self._settings,
            processor=given.get("processing_class"),
            loader=given.get("train_dataloader"),
        ).findings
        tell(self._begun)
        wrong = [finding for finding in self._begun if finding.severity is Severity.ERROR]
        if not wrong:
            return None
        return TrainingError(
            f"this run would go wrong: {'; '.join(f'{f.code} {f.title}' for f in wrong)}",
            where=wrong[0].where,
            why="; ".join(f.message for f in wrong),
            help="; ".join(dict.fromkeys(f.help for f in wrong if f.help)),
            code="guard",
        )

    def _compare(self, args: Any, state: Any, model: PeftModel) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _raise(found_by_first(lambda: self._read(folder, model)))
        self._good = folder

    def _read(self, folder: Path, model: PeftModel) -> GraftError | None:
        known = {(finding.code, finding.message) for finding in self._saved}
        self._saved = read_back(folder, model, self._settings).findings
        tell(finding for finding in self._saved if (finding.code, finding.message) not in known)
        return refusal(self._saved, folder, self._good)

    def _not_finite(self, kind: str, names: tuple[str, ...], step: int) -> TrainingError:
        return TrainingError(
            f"a {kind} is not finite",
            where=f"step {step}: {some(names, 1)}",
            why="going on would spread it to every weight of the adapter",
            help=f"{told_good(self._good)}; lower the learning rate, train in bf16, and look at that step's data",
            code="not-finite",
        )

    def _note_saturation(self, course: Course) -> None:
        rule, grown = _rule("GK306"), course.grown_saturation
        allowed = rule.limit(self._settings, "increase")
        worst = max(grown, key=lambda path: grown[path], default=None)
        if worst is not None and grown[worst] > allowed:
            message = f"since training began, {100 * grown[worst]:.1f} % more of its activations are clamped"
            self._note(rule, failed(message, where=worst, worst_increase=grown[worst], allowed_increase=allowed))

    def _note_dead(self, lives: Lives) -> None:
        if lives.steps >= _PATIENCE:
            self._note(_rule("GK203"), _told_of(lives))

    def _note(self, rule: Rule, seen: Observation) -> None:
        """Keep what a rule says of the whole run, and tell it once; none of this stops a run."""
        if not self._settings.wants(rule.code) or rule.code in self._noted:
            return
        finding = rule.finding(seen, Severity.WARNING)
        self._noted[rule.code] = replace(finding, title=f"{finding.title}, while training")
        tell([self._noted[rule.code]])


def _told_of(lives: Lives) -> Observation:
    """Which of the trained tensors were ever trained."""
    tensors, untrained = len(lives.names), lives.untrained
    steps = f"{lives.steps} watched steps"
    if not untrained:
        return passed(f"all {tensors} tensors were trained on {steps}", tensors=tensors, dead=0)
    return failed(
        f"{len(untrained)} of {tensors} tensors had no gradient on {steps}, or are still the zeros they began as",
        where=name_in_base(untrained[0]),
        help="leave them out of the targets, or put what feeds them in the data; equal rewards train nothing",
        tensors=tensors,
        dead=len(untrained),
        watched_steps=lives.steps,
    )


def _nothing_trains(lives: Lives, step: int) -> TrainingError:
    return TrainingError(
        "no weight of the adapter changes",
        where=f"step {step}",
        why=f"gradients arrive, and {lives.steps} watched steps of the optimizer changed nothing",
        help="build the optimizer after the adapter is attached; in 16 bit, a small learning rate is rounded away",
        code="nothing-trains",
    )


def _adapted(model: Any) -> PeftModel:
    """The PEFT model, out of the wrappers that distribute or compile it."""
    from peft import PeftModel

    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise TrainingError(
                f"nothing to guard: {type(model).__name__} carries no adapter",
                why="without one, every weight of the model is trained",
                help="pass peft_config=plan.peft_config to the trainer, or a model from gk.attach",
                code="no-adapter",
            )
        model = inner
    return model


def _groups(optimizer: Any) -> Iterable[Mapping[str, Any]]:
    return getattr(optimizer, "param_groups", None) or ({"lr": 1.0},)


def _rule(code: str) -> Rule:
    return next(rule for rule in all_rules() if rule.code == code)


def _raise(found: GraftError | None) -> None:
    if found is not None:
        raise found
