"""Check that the trainer has every argument of the recipe.

## Why it matters

`graft train` refuses an argument that TRL's configuration class does not have: nothing is trained.

## Example

`learning_rat: 1.0e-4`, or `num_generations: 8` for sft, which only grpo has.

## How safe that is

Until then the recipe cannot be used for training at all.

## Sources

- trl: SFTConfig, DPOConfig, GRPOConfig of the installed version
"""

from __future__ import annotations

from collections.abc import Sequence

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.errors import MissingDependencyError
from graftkit.findings import Severity, Source
from graftkit.recipes.arguments import UnknownArgument, unknown_arguments


def _check(context: CheckContext) -> Observation:
    if not context.recipe.args:
        return passed("the recipe gives no arguments")
    name = context.recipe.fields.trainer.config_class
    try:
        unrecognized = unknown_arguments(context.recipe)
    except MissingDependencyError as error:
        return unknown(f"{error.what}: {error.why}", help=error.help)
    if not unrecognized:
        return passed(f"{name} has every argument of the recipe", arguments=len(context.recipe.args))
    return failed(
        f"{name} has no argument {', '.join(_placed(argument) for argument in unrecognized)}",
        help=_advice(unrecognized),
        key=f"args.{unrecognized[0].name}",
        unknown={argument.name: argument.advice for argument in unrecognized},
    )


def _placed(argument: UnknownArgument) -> str:
    place = argument.place
    return f"{argument.name!r} (line {place[0]}, column {place[1]})" if place else repr(argument.name)


def _advice(unrecognized: Sequence[UnknownArgument]) -> str:
    if len(unrecognized) == 1:
        return unrecognized[0].advice
    return "; ".join(f"{argument.name}: {argument.advice}" for argument in unrecognized)


RULE = Rule(
    code="GK212",
    title="the trainer has every argument of the recipe",
    severity=Severity.ERROR,
    needs=("recipe",),
    check=_check,
    help="use the name in TRL's configuration class",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
