"""What has to be there before a run starts, all of it at once: libraries, the device, files, arguments."""

from __future__ import annotations

from collections.abc import Sequence

from graftkit.checks.chat.templates import as_trained
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.rules import all_rules
from graftkit.data.load import load_data
from graftkit.data.rewards import load_rewards
from graftkit.env import environment, this_machine
from graftkit.errors import SourceError, TrainingError
from graftkit.findings import Finding
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.trainer_arguments import named_files
from graftkit.recipes.trainers import TrainerName
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.local_processor import local_processor

_SUPPLIED = ("environment", "machine", "recipe")


def check_ready(recipe: Recipe, *, trust_remote_code: bool = False) -> None:
    """Check what a run of this recipe needs, before anything large is read.

    The rules are those that need the recipe and this machine alone; the recipe's ``checks`` choose among them.

    Raises:
        TrainingError: ``not-ready``: names all that is missing.
        DataError: ``reward``: a reward cannot be imported.
    """
    processor = local_processor(recipe.fields.model, trust_remote_code=trust_remote_code)
    inputs = Inputs(
        environment=environment()["packages"],
        machine=this_machine(),
        recipe=recipe,
        rows=lambda: load_data(recipe).train,
        processor=None if processor is None else as_trained(processor, {**recipe.args, **named_files(recipe)}),
        model_refusal=_model_refusal(recipe, trust_remote_code),
    )
    report = run(decidable(all_rules(), _SUPPLIED), CheckContext(inputs, recipe.fields.checks))
    # Where unknown arguments are all that is wrong, what makes the arguments says it, with the column.
    if {error.code for error in report.errors} - {"GK212"}:
        raise _not_ready(report.errors, recipe)
    if recipe.fields.trainer is TrainerName.GRPO:
        load_rewards(recipe.fields.data.reward, recipe.path.parent)


def _model_refusal(recipe: Recipe, trust_remote_code: bool) -> SourceError | None:
    try:
        load_config(recipe.fields.model, trust_remote_code=trust_remote_code)
    except SourceError as error:
        return error
    return None


def _not_ready(errors: Sequence[Finding], recipe: Recipe) -> TrainingError:
    first = errors[0]
    return TrainingError(
        f"this run cannot start: {'; '.join(f'{error.code} {error.title}' for error in errors)}",
        where=f"{recipe.path}:{first.line}" if first.line else str(recipe.path),
        why="\n       ".join(error.message for error in errors),
        help="\n        ".join(dict.fromkeys(error.help for error in errors if error.help)),
        code="not-ready",
    )
