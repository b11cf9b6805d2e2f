"""Adapted experts must not get options that work on modules alone.

## Why it matters

`get_peft_model` raises: PEFT adapts a parameter by adding to it, and has no input to drop or to scale.

## Example

`lora_dropout: 0.05` with the usual seven names on a mixture of experts whose names PEFT rewrites:
"lora.ParamWrapper does not work with lora_dropout != 0".

## How safe that is

The option goes for the other layers too: without dropout the adapter may overfit a little sooner.

## Sources

- https://github.com/modelscope/ms-swift/issues/9589
- peft: tuners.lora.layer.ParamWrapper
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import config_fix, recipe_key
from graftkit.findings import Severity, Source
from graftkit.planning.config.options import not_on_parameters


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    if not resolved.parameters:
        return passed("no parameter is adapted, so every option works")
    options = not_on_parameters(resolved.given)
    if not options:
        return passed(f"the options suit the {len(resolved.parameters)} adapted parameters")
    named = ", ".join(options.values())
    made = (
        f"; PEFT makes {', '.join(sorted(resolved.rewritten))} into parameters here" if resolved.rewritten else ""
    )
    return failed(
        f"{named} cannot be used on the {len(resolved.parameters)} parameters that are adapted{made}",
        where=resolved.parameters[0],
        help=f"drop {named}, or leave the experts out of the targets",
        fix=config_fix(context, removes=options),
        key=recipe_key(context, next(iter(options))),
        parameters=len(resolved.parameters),
        options=sorted(options),
    )


RULE = Rule(
    code="GK105",
    title="adapted experts get no option that a parameter cannot take",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="drop the option, or leave the experts out of the targets",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
