"""TRL's configuration of a trainer, made of a recipe's ``args``, and what it refuses of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from graftkit.env import Machine, this_machine
from graftkit.errors import RecipeError
from graftkit.recipes.arguments import advice_on, argument_names, config_class, unknown_arguments
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.training import checkpointing_argument, uses_cpu

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What a trial leaves out: settings of the whole process, and those that are not for the configuration.
_NOT_TRIED = frozenset({"deepspeed", "fsdp", "fsdp_config", "model_init_kwargs", "use_cpu"})


def trainer_arguments(recipe: Recipe) -> TrainingArguments:
    """Return TRL's configuration with the recipe's arguments.

    By default, activation checkpointing is not re-entrant, the output goes to ``out/`` and the recipe's name, and
    a machine without an accelerator trains on its CPU. Files that arguments name are relative to the recipe.

    Raises:
        RecipeError: ``recipe-invalid``, with the line of an unknown argument, or why a value is refused.
        MissingDependencyError: TRL is not installed.
    """
    _check_names(recipe)
    made = config_class(recipe.fields.trainer)
    given = {**_defaults(recipe, this_machine()), **recipe.args}
    given.pop("model_init_kwargs", None)
    given |= {argument: str(file) for argument, file in named_files(recipe).items()}
    try:
        return made(**given)
    except Exception as error:  # files that it names, values of other types: its classes raise anything
        raise RecipeError(
            f"{made.__name__} refuses the recipe's arguments",
            where=recipe.document.where(("args",)),
            why=_why(error),
            help="change in the recipe what it names",
            code="recipe-invalid",
        ) from error


def named_files(recipe: Recipe) -> dict[str, Path]:
    """Return the files that arguments name: a DeepSpeed configuration, a chat template."""
    given = {name: recipe.args.get(name) for name in ("deepspeed", "chat_template_path")}
    # A template may also be that of a model, by its name. Source: trl.trainer.sft_trainer.SFTTrainer.
    return {
        name: recipe.path.parent / value
        for name, value in given.items()
        if isinstance(value, str) and (name == "deepspeed" or value.endswith((".jinja", ".j2")))
    }


def output_folder(recipe: Recipe) -> Path:
    """Return the absolute path of the folder that a run writes to, which is relative to the current one."""
    return Path(str(recipe.args.get("output_dir") or default_output(recipe))).expanduser().absolute()


def default_output(recipe: Recipe) -> Path:
    """Return where a run writes to by default."""
    return Path("out") / recipe.path.stem


def argument_refusals(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what TRL and transformers refuse of the arguments, as (key of the recipe, why).

    The configuration is made as for a CPU, whatever the machine; then the optimizer and the trackers that it names
    are asked whether their libraries are there. Raises as :func:`config_class`.

    Source: ``transformers.Trainer.__init__`` and ``create_optimizer``, which ask them after the model was loaded.
    """
    made = config_class(recipe.fields.trainer)
    known = argument_names(recipe.fields.trainer)
    given = {name: value for name, value in recipe.args.items() if name in known and name not in _NOT_TRIED}
    wrong = dict(_wrong_types(made, given))
    yield from ((f"args.{name}", why) for name, why in wrong.items())
    rest = {name: value for name, value in given.items() if name not in wrong}
    given = {**_defaults(recipe, Machine(None, bf16=False)), **rest, "use_cpu": True}
    trials: dict[str, Callable[[], object]] = {
        "args": lambda: made(**given),
        "args.report_to": lambda: _make_trackers(given["report_to"]),
        "args.optim": lambda: _find_optimizer(made, given),
    }
    refused: dict[str, str] = {}
    for key, trial in trials.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning refuses nothing, and comes again where it matters
                trial()
        except Exception as error:  # as in trainer_arguments
            refused.setdefault(_why(error), key)
    yield from ((key, why) for why, key in refused.items())


def _wrong_types(made: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the arguments that must be numbers and are not, which the configuration class does not look at."""
    hints = get_type_hints(made)
    for name, value in given.items():
        kinds = set(get_args(hints[name]) or (hints[name],)) - {NoneType}
        if kinds <= {bool, int, float} and not isinstance(value, (bool, int, float, NoneType)):
            meant = " or ".join(sorted(kind.__name__ for kind in kinds))
            yield name, f"{value!r} is not of the type {meant}"


def _make_trackers(names: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    if names not in ("all", ["all"], "none", ["none"]):  # all: those that are installed
        for tracker in get_reporting_integration_callbacks(names):
            tracker()


def _find_optimizer(made: Any, given: Mapping[str, Any]) -> None:
    """Ask for the optimizer alone: what else is wrong with the arguments is known by then."""
    from transformers import Trainer

    kept = ("activation_checkpointing", "gradient_checkpointing", "use_cpu")
    args = made("out", report_to="none", **{n: v for n, v in given.items() if n.startswith("optim") or n in kept})
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        # Some want the model first, which a trial does not have; a missing library is then not known.
        if not isinstance(error.__context__, ImportError):
            return
        raise


def _check_names(recipe: Recipe) -> None:
    unknown = unknown_arguments(recipe.document, recipe.fields.trainer, recipe.args)
    if unknown:
        name = recipe.fields.trainer.config_class
        raise RecipeError(
            f"{name} has no argument {', '.join(map(str, unknown))}",
            where=recipe.document.where(("args", unknown[0].name)),
            why=f"args are those of TRL's {name}, unchanged",
            help=advice_on(unknown),
            code="recipe-invalid",
        )


def _defaults(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    defaults: dict[str, Any] = {"output_dir": str(default_output(recipe)), "report_to": "none"}
    # TRL sets its default under the name that transformers deprecates, with a warning. Options are left out:
    # without any, transformers takes the non-re-entrant kind; from any, TRL makes the re-entrant one under ZeRO-3.
    if checkpointing_argument(recipe.args, "checkpointing", None)[0] is None:
        defaults["activation_checkpointing"] = True
    if uses_cpu(recipe.args, machine):
        # Without it TRL's default of bf16 is refused, as for a GPU that cannot do it.
        defaults["use_cpu"] = True
    return defaults


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"
