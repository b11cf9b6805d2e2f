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

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.errors import MissingDependencyError
from graftkit.findings import Severity, Source
from graftkit.recipes.arguments import advice_on, unknown_arguments


def _check(context: CheckContext) -> Observation:
    recipe = context.recipe
    if not recipe.args:
        return passed("the recipe gives no arguments")
    name = recipe.fields.trainer.config_class
    try:
        unrecognized = unknown_arguments(recipe.document, recipe.fields.trainer, recipe.args)
    except MissingDependencyError as error:
        return unknown(f"{error.what}: {error.why}", help=error.help)
    if not unrecognized:
        return passed(f"{name} has every argument of the recipe", arguments=len(recipe.args))
    return failed(
        f"{name} has no argument {', '.join(map(str, unrecognized))}",
        help=advice_on(unrecognized),
        key=f"args.{unrecognized[0].name}",
        unknown={argument.name: argument.advice for argument in unrecognized},
    )


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
