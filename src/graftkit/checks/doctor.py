"""``doctor()``: rules on a fine-tune before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, read_config
from graftkit.checks.chat.templates import as_trained
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.rules import all_rules
from graftkit.env import environment, this_machine
from graftkit.errors import (
    BuildError,
    DataError,
    MissingDependencyError,
    ModelTypeError,
    PlanError,
    RecipeError,
    SourceError,
)
from graftkit.findings import Report
from graftkit.planning.config.build import config_dict
from graftkit.progress import Progress
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.trainer_arguments import named_files
from graftkit.recipes.training import Training, training_of
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.local_processor import local_processor
from graftkit.surveying.survey import is_live, survey

# The inputs that need no live model, no batch, no tensors of an adapter, and no machine that trains.
STATIC = (
    "environment",
    "config",
    "base",
    "base_files",
    "peft_config",
    "plan",
    "recipe",
    "training",
    "rows",
    "processor",
    "checkpoint",
)


def doctor(
    model: Any = None,
    *,
    recipe: Recipe | None = None,
    adapter: str | Path | None = None,
    settings: CheckSettings | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Run every rule that needs no live model, for a training on this machine.

    Args:
        model: a ``ModelMap``, or anything ``survey`` takes. None: the recipe's model, where there is a recipe.
        adapter: a folder with an ``adapter_config.json``, which is checked instead of the recipe's targets.
        settings: which rules, with which limits; those of the recipe if None.
        trust_remote_code: allow the model's own code to run.
        revision: branch, tag or commit of a hub id.
        on_progress: called before each rule.

    Returns:
        One finding a rule. A rule that needs a model or a recipe, where none was given, is "unknown".

    Raises:
        SourceError, BuildError: the model that was given cannot be found or built. That of the recipe is a finding
            (GK006), and so is a model type that transformers does not know (GK001).
        AdapterError: the adapter's configuration cannot be read.
    """
    given = static_inputs(
        model, recipe=recipe, adapter=adapter, trust_remote_code=trust_remote_code, revision=revision
    )
    context = CheckContext(replace(given, machine=this_machine()), settings or settings_of(recipe))
    return run(decidable(all_rules(), (*STATIC, "machine")), context, on_progress=on_progress)


def settings_of(recipe: Recipe | None) -> CheckSettings:
    """Return the settings of a recipe, or the default ones."""
    return recipe.fields.checks if recipe else CheckSettings()


def static_inputs(
    model: Any = None,
    *,
    recipe: Recipe | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Inputs:
    """Return the inputs that need no live model. Arguments and errors as in :func:`doctor`."""
    source = model if model is not None or recipe is None else recipe.fields.model
    given = Inputs(environment=environment()["packages"])
    if recipe is not None:
        found = local_processor(source, trust_remote_code=trust_remote_code, revision=revision)
        given = replace(
            given,
            recipe=recipe,
            training=_training(recipe),
            rows=partial(_rows, recipe),
            processor=None if found is None else as_trained(found, {**recipe.args, **named_files(recipe)}),
        )
    if source is not None:
        try:
            given = _with_model(given, source, trust_remote_code, revision)
        except (SourceError, BuildError) as error:
            if recipe is None or model is not None:
                raise
            given = replace(given, model_refusal=error)
    if adapter is not None:
        folder = Path(adapter).expanduser()
        return replace(given, folder=folder, peft_config=read_config(folder / CONFIG_NAME))
    return given if recipe is None else _with_plan(given, recipe)


def _rows(recipe: Recipe) -> Any:
    """Read the recipe's training data, unless that would download it."""
    from datasets import config

    from graftkit.data.load import load_data
    from graftkit.data.source import place_of

    path = recipe.fields.data.path
    if path is not None and not place_of(path, recipe).exists() and not config.HF_HUB_OFFLINE:
        raise DataError(
            f"the data {path} is not a local file or folder",
            why="a check downloads nothing; training reads and checks it",
            help="HF_HUB_OFFLINE=1 reads it from the cache, if it is there",
            code="data-not-local",
        )
    return load_data(recipe).train


def _training(recipe: Recipe) -> Training | None:
    try:
        return training_of(recipe)
    except RecipeError:  # a file that it names is not there: GK006
        return None


def _with_model(given: Inputs, source: Any, trust_remote_code: bool, revision: str | None) -> Inputs:
    if isinstance(source, ModelMap):
        return replace(given, base=source, base_files=source.checkpoint)
    if is_live(source):
        config = getattr(source, "config", None)
        return replace(given, base=survey(source), config=None if config is None else config.to_dict())
    try:
        loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    except ModelTypeError as error:
        return replace(given, config=error.config)
    # Read before the model is built: its class may write into its configuration.
    config = loaded.config.to_dict()
    base = survey(loaded)
    return replace(given, base=base, base_files=base.checkpoint, config=config)


def _with_plan(given: Inputs, recipe: Recipe) -> Inputs:
    stock = recipe.fields.adapter.peft_config
    if stock is not None:
        return replace(given, peft_config=stock)
    if given.base is None:
        return given
    try:
        made = recipe.plan(given.base)
    except PlanError as error:
        return replace(given, recipe_refusal=error)
    except MissingDependencyError:  # GK004
        return given
    return replace(given, plan=made, peft_config=config_dict(made.peft_config))
