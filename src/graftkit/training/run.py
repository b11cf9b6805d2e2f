"""``train()``: a recipe, from the first check to the files that are read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import check_against_plan
from graftkit.checks.check import check
from graftkit.data.load import load_data
from graftkit.errors import TrainingError
from graftkit.findings import Report
from graftkit.modeling.unwrapping import peft_model_of
from graftkit.planning.plan import Plan
from graftkit.progress import Progress
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.trainer_arguments import trainer_arguments
from graftkit.training.checkpointing.checkpoints import checkpoint_to_resume
from graftkit.training.distributed.fsdp2 import check_attachable, check_sharding
from graftkit.training.distributed.launch_checks import (
    check_checkpointing,
    check_parallelism,
    check_processes_joined,
)
from graftkit.training.distributed.sharding import save_full_adapter
from graftkit.training.model import load_base
from graftkit.training.readiness import check_ready
from graftkit.training.report_page import write_page
from graftkit.training.result import TrainingResult
from graftkit.training.trainers.inputs import TrainerInputs

# What imports transformers' trainer, and PEFT with it, is imported only after check_ready().
if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from graftkit.training.checkpointing.interrupt import SaveOnInterrupt
    from graftkit.training.guard.guard import Guard

# What a trainer adds to the metrics of an evaluation.
_TIMINGS = ("_runtime", "_per_second", "_num_tokens")


def train(
    recipe: Recipe | str | Path,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> TrainingResult:
    """Train an adapter as the recipe says, guarded, and read back what was saved.

    Args:
        recipe: what ``read_recipe`` returns, or the path of a recipe.
        resume: continue from the last complete checkpoint of the output folder.
        trust_remote_code: let the model's own code run.
        callbacks: further callbacks for the trainer.
        on_progress: called before each step of the preparation.

    Raises:
        RecipeError, DataError, SourceError, BuildError, PlanError: before anything is trained.
        TrainingError: ``not-ready``: something that the recipe needs is not there; or the trainer refuses the run,
            the guard stopped it, there is nothing to resume, or the saved adapter is incomplete.
    """
    started = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    check_ready(recipe, trust_remote_code=trust_remote_code)
    from graftkit.training.checkpointing.resume import check_resumable
    from graftkit.training.initialization.kept import convert_to_plain_lora
    from graftkit.training.initialization.start import check_start, start_from_initializer

    args: Any = trainer_arguments(recipe)
    check_processes_joined(args)
    check_checkpointing(args)
    check_sharding(recipe, args, resume)
    checkpoint = checkpoint_to_resume(Path(args.output_dir)) if resume else None
    if checkpoint is not None:
        check_resumable(checkpoint, args)
    check_start(recipe, args, checkpoint)
    on_progress(Progress("reading the data", 0, 4))
    data = load_data(recipe)
    on_progress(Progress("loading the model", 1, 4))
    base = load_base(recipe, data.modalities, trust_remote_code=trust_remote_code)
    check_attachable(base)
    on_progress(Progress("preparing the trainer", 2, 4))
    run = _Run.prepare(TrainerInputs(recipe, base, data, args, callbacks), started)
    check_parallelism(run.trainer)
    _check_rows_are_left(run.trainer, recipe)
    if base.plan is not None:
        check_against_plan(run.trainer.model, base.plan)
    on_progress(Progress("initializing the adapter", 3, 4))
    start = start_from_initializer(run.trainer, base, checkpoint)
    run = run.with_plan(start.plan)
    run.train(checkpoint)
    save_full_adapter(run.trainer, run.folder)
    if start.moved is not None and run.is_first_process:
        convert_to_plain_lora(run.folder, start.moved)
    run.sign()
    result = run.result(run.evaluate(), Report((*run.guard.report, *run.check_saved())))
    run.write_report(result)
    # A launcher that sees one process end may end the others.
    run.trainer.accelerator.wait_for_everyone()
    _raise_first_error(result)
    return result


@dataclass(frozen=True)
class _Run:
    """A trainer and the callbacks that graftkit adds to it."""

    inputs: TrainerInputs
    trainer: Any
    guard: Guard
    interrupt: SaveOnInterrupt
    started: float

    @classmethod
    def prepare(cls, inputs: TrainerInputs, started: float) -> _Run:
        from graftkit.training.checkpointing.interrupt import SaveOnInterrupt
        from graftkit.training.guard.guard import Guard

        guard = Guard(inputs.base.plan, settings=inputs.recipe.fields.checks, rows=inputs.data.train)
        interrupt = SaveOnInterrupt()
        trainer = _make_trainer(replace(inputs, callbacks=(guard, interrupt, *inputs.callbacks)))
        return cls(inputs, trainer, guard, interrupt, started)

    def with_plan(self, plan: Plan | None) -> _Run:
        """Return the run with the plan of what is adapted."""
        return replace(self, inputs=replace(self.inputs, base=replace(self.inputs.base, plan=plan)))

    def train(self, checkpoint: Path | None) -> None:
        """Train to the end; the report of a run that was stopped says why."""
        from graftkit.training.checkpointing.resume import train_from

        try:
            train_from(self.trainer, checkpoint)
        except TrainingError:
            self.write_report(self.result({}, self.guard.report))
            raise
        finally:
            self.interrupt.restore()

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    @property
    def is_first_process(self) -> bool:
        return bool(self.trainer.is_world_process_zero())

    def evaluate(self) -> Mapping[str, float]:
        """Return the metrics of the adapter on held-out data, without those of the evaluation itself."""
        if self.inputs.data.held_out is None or self.interrupt.requested:
            return {}
        metrics = self.trainer.evaluate()
        return {
            name: value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and name != "epoch" and not name.endswith(_TIMINGS)
        }

    def sign(self) -> None:
        """Write beside the adapter what it was trained on, and what it should answer."""
        from graftkit.serving.sign import Signer

        model = peft_model_of(self.trainer.model)
        if self.is_first_process and model is not None:
            Signer().sign(model, self.inputs.base.processor, self.folder)

    def check_saved(self) -> Report:
        return check(self.folder, self.inputs.base.map) if self.is_first_process else Report(())

    def result(self, metrics: Mapping[str, float], findings: Report) -> TrainingResult:
        return TrainingResult(
            folder=self.folder,
            trainer=self.inputs.recipe.fields.trainer,
            steps=self.trainer.state.global_step,
            history=tuple(self.trainer.state.log_history),
            metrics=metrics,
            findings=findings,
            seconds=time.monotonic() - self.started,
            plan=self.inputs.base.plan,
            interrupted=self.interrupt.requested,
        )

    def write_report(self, result: TrainingResult) -> None:
        if self.is_first_process:
            write_page(result, self.inputs.base.map, self.guard.curves)


def _make_trainer(inputs: TrainerInputs) -> Trainer:
    from graftkit.training.trainers.dpo import dpo_trainer
    from graftkit.training.trainers.grpo import grpo_trainer
    from graftkit.training.trainers.sft import sft_trainer

    recipe = inputs.recipe
    make = {"sft": sft_trainer, "dpo": dpo_trainer, "grpo": grpo_trainer}[recipe.fields.trainer]
    try:
        return make(inputs)
    except ValueError as error:
        raise TrainingError(
            "the trainer refuses this run",
            where=str(recipe.path),
            why=str(error),
            help="change in the recipe what the trainer names",
            code="trainer-refused",
        ) from error


def _check_rows_are_left(trainer: Any, recipe: Recipe) -> None:
    """Refuse data of which TRL dropped every row: of each, nothing to learn is left after the cut."""
    if len(trainer.train_dataset):
        return
    raise TrainingError(
        "no row keeps a token to learn",
        where=recipe.document.where(("args", "max_length")),
        why="TRL cut the rows at max_length, and dropped those of which nothing is learned: all of them",
        help="graft doctor says how long the rows are; args: {max_length: null} cuts none",
        code="nothing-to-learn",
    )


def _raise_first_error(result: TrainingResult) -> None:
    if result.findings.errors:
        error = result.findings.errors[0]
        raise TrainingError(
            f"the run ended with an error: {error.code} {error.title}",
            where=str(result.folder),
            why=error.message,
            help=error.help or f"graft check {result.folder}",
            code="run-not-sound",
        )
