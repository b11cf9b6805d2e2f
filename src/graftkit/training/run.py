"""``train()``: a recipe from the first check to the files that were read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import hold_to_plan
from graftkit.checks.check import check
from graftkit.errors import TrainingError
from graftkit.findings import Report
from graftkit.planning.plan import Plan
from graftkit.recipes.recipe import Recipe
from graftkit.training.arguments import trainer_arguments
from graftkit.training.checkpointing.checkpoints import resume_point
from graftkit.training.checkpointing.resume import check_fits, train_from
from graftkit.training.data.load import Data, load_data
from graftkit.training.distributed.fsdp2 import check_attachable, check_sharding
from graftkit.training.distributed.launch_checks import (
    check_parallelism,
    check_recomputation,
    check_together,
    save_whole,
)
from graftkit.training.model import Base, load_base

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

REPORT_NAME = "report.html"
# What a trainer adds to the metrics of an evaluation.
_TIMINGS = ("_runtime", "_per_second", "_num_tokens")


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        folder: where the adapter, the processor and the report are.
        trainer: "sft", "dpo" or "grpo".
        steps: optimizer steps in all, those before a resume included.
        history: what the trainer logged, one mapping an entry, with its ``step``.
        metrics: of the last evaluation, empty without held-out data.
        findings: of the guard, and of the saved adapter.
        seconds: of this run, loading included.
        plan: what was adapted; None for a stock PEFT configuration.
        interrupted: whether Ctrl-C ended it; a checkpoint was then saved.
    """

    folder: Path
    trainer: str
    steps: int
    history: tuple[Mapping[str, Any], ...] = field(repr=False)
    metrics: Mapping[str, float]
    findings: Report
    seconds: float
    plan: Plan | None = field(repr=False)
    interrupted: bool = False

    def curve(self, name: str) -> tuple[tuple[int, float], ...]:
        """(step, value) of everything logged under a name: "loss", "eval_loss", "rewards/margins" …"""
        return tuple((int(entry["step"]), float(entry[name])) for entry in self.history if name in entry)

    def to_dict(self) -> dict[str, Any]:
        losses = self.curve("loss")
        return {
            "folder": str(self.folder),
            "trainer": self.trainer,
            "steps": self.steps,
            "loss": {"first": losses[0][1], "last": losses[-1][1]} if losses else None,
            "metrics": dict(self.metrics),
            "history": [dict(entry) for entry in self.history],
            "trainable_params": self.plan.trainable_params if self.plan else None,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "report": str(self.folder / REPORT_NAME),
            **self.findings.to_dict(),
        }

    def __str__(self) -> str:
        told = self.to_dict()
        loss = told["loss"]
        fell = f", loss {loss['first']:.3f} -> {loss['last']:.3f}" if loss else ""
        lines = [f"{self.trainer}: {self.steps} steps in {self.seconds:.0f} s{fell}"]
        lines += [f"{name}: {value:.4g}" for name, value in self.metrics.items()]
        lines += ["interrupted: graft train --resume goes on from the last checkpoint"] if self.interrupted else []
        lines += [f"adapter: {self.folder}", f"report: {told['report']}"]
        return "\n".join(lines) + f"\n\n{self.findings}"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    tell: Callable[[str], None] = lambda _step: None,
) -> TrainingResult:
    """Train an adapter as the recipe says, guarded, and read back what was saved.

    Args:
        recipe: model, adapter, data, trainer and its arguments.
        resume: go on from the last whole checkpoint of the output folder.
        trust_remote_code: let the model's own code run.
        callbacks: further callbacks for the trainer.
        tell: called with each step of the preparation.

    Raises:
        RecipeError, DataError, SourceError, BuildError, PlanError: before anything is trained.
        TrainingError: the trainer refuses the run, the guard stopped it, there is nothing to resume, or the saved
            adapter is not whole.
    """
    started = time.monotonic()
    args: Any = trainer_arguments(recipe)
    check_together(args)
    check_recomputation(args)
    check_sharding(recipe, args, resume)
    checkpoint = resume_point(Path(args.output_dir)) if resume else None
    if checkpoint is not None:
        check_fits(checkpoint, args)
    tell("reading the data")
    data = load_data(recipe)
    tell("loading the model")
    base = load_base(recipe, data.modalities, trust_remote_code=trust_remote_code)
    check_attachable(base)
    watch = _Watch.of(base, recipe)
    tell("preparing the trainer")
    trainer = _trainer(recipe, base, data, args, [*watch.callbacks, *callbacks])
    check_parallelism(trainer)
    if base.plan is not None:
        hold_to_plan(trainer.model, base.plan)
    run = _Run(recipe, base, trainer, watch, started)
    try:
        train_from(trainer, checkpoint)
    except TrainingError:
        run.tell(run.result({}, watch.guard.report))
        raise
    finally:
        watch.interrupt.restore()
    return _finished(run, data)


@dataclass(frozen=True)
class _Watch:
    """The callbacks that graftkit adds."""

    guard: Any
    interrupt: Any

    @classmethod
    def of(cls, base: Base, recipe: Recipe) -> _Watch:
        from graftkit.training.checkpointing.interrupt import SaveOnInterrupt
        from graftkit.training.guard.guard import Guard

        return cls(Guard(base.plan, settings=recipe.fields.checks), SaveOnInterrupt())

    @property
    def callbacks(self) -> tuple[Any, ...]:
        return self.guard, self.interrupt


def _trainer(recipe: Recipe, base: Base, data: Data, args: Any, callbacks: Sequence[TrainerCallback]) -> Trainer:
    from graftkit.training.trainers.dpo import dpo_trainer
    from graftkit.training.trainers.grpo import grpo_trainer
    from graftkit.training.trainers.rewards import rewards_named
    from graftkit.training.trainers.sft import sft_trainer

    try:
        if recipe.fields.trainer == "grpo":
            rewards = rewards_named(recipe.fields.data.reward, recipe.path.parent)
            return grpo_trainer(base, data, args, callbacks, rewards)
        return {"sft": sft_trainer, "dpo": dpo_trainer}[recipe.fields.trainer](base, data, args, callbacks)
    except ValueError as error:
        raise TrainingError(
            "the trainer refuses this run",
            where=str(recipe.path),
            why=str(error),
            help="change what it names in the recipe",
            code="trainer-refused",
        ) from error


@dataclass(frozen=True)
class _Run:
    """A run that has begun, and what is told of it."""

    recipe: Recipe
    base: Base
    trainer: Any
    watch: _Watch
    started: float

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return bool(self.trainer.is_world_process_zero())

    def result(self, metrics: Mapping[str, Any], findings: Report) -> TrainingResult:
        return TrainingResult(
            folder=self.folder,
            trainer=self.recipe.fields.trainer,
            steps=self.trainer.state.global_step,
            history=tuple(self.trainer.state.log_history),
            metrics={name: value for name, value in metrics.items() if _is_measure(name, value)},
            findings=findings,
            seconds=time.monotonic() - self.started,
            plan=self.base.plan,
            interrupted=self.watch.interrupt.asked,
        )

    def tell(self, result: TrainingResult) -> None:
        """Write the report; that of a run that was stopped says why."""
        from graftkit.training.report_page import write_page

        if self.is_first:
            write_page(result, self.base.map, self.watch.guard.curves, REPORT_NAME)


def _finished(run: _Run, data: Data) -> TrainingResult:
    """Save, read back, measure, report."""
    save_whole(run.trainer, run.folder)
    measured = data.held_out is not None and not run.watch.interrupt.asked
    metrics = run.trainer.evaluate() if measured else {}
    saved = check(run.folder, run.base.map) if run.is_first else Report(())
    result = run.result(metrics, Report((*run.watch.guard.report, *saved)))
    run.tell(result)
    # A launcher that sees one process end may end the others.
    run.trainer.accelerator.wait_for_everyone()
    _refuse_broken(result)
    return result


def _is_measure(name: str, value: Any) -> bool:
    """Whether it says something of the adapter, and not of how long looking took."""
    return isinstance(value, (int, float)) and name != "epoch" and not name.endswith(_TIMINGS)


def _refuse_broken(result: TrainingResult) -> None:
    from graftkit.findings import Severity

    broken = next((f for f in result.findings if f.severity is Severity.ERROR), None)
    if broken is not None:
        raise TrainingError(
            f"the run ended with an error: {broken.code} {broken.title}",
            where=str(result.folder),
            why=broken.message,
            help=broken.help or f"graft check {result.folder}",
            code="run-not-sound",
        )
