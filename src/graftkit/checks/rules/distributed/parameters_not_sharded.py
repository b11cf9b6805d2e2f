"""Check that PEFT adapts no parameter that ZeRO-3 shards.

## Why it matters

PEFT adds to a parameter before its module runs, and DeepSpeed gathers it only then: an error at the first step,
or ranks that wait for each other.

## Example

LoRA on stacked experts through target_parameters, with a DeepSpeed configuration of stage 3.

## How safe that is

A leaf module is gathered as a whole: each device needs the memory for one block of experts.

## Sources

- https://github.com/huggingface/peft/issues/2916
- https://github.com/huggingface/peft/pull/3576
- https://github.com/deepspeedai/DeepSpeed/pull/4966
- peft: tuners.lora.layer.ParamWrapper._activate_lora
"""

from __future__ import annotations

from packaging.version import Version

from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.env import version_of
from graftkit.findings import Severity, Source

# The first release that reads the shape of a sharded parameter (peft#3576, after 0.20.0).
_READS_SHARDED = Version("0.20.1")


def _check(context: CheckContext) -> Observation:
    if context.training.zero_stage != 3:
        return passed(f"ZeRO stage {context.training.zero_stage} does not shard parameters")
    parameters = _parameters(context)
    if not parameters:
        return passed("no parameter is adapted")
    given = (context.given.environment or {}).get("peft") or version_of("peft")
    key = recipe_key(context, "target_parameters")
    if given is not None and Version(given) < _READS_SHARDED:
        message = f"peft {given} raises IndexError over the {len(parameters)} adapted parameters under ZeRO-3"
        advice = f"pip install 'peft>={_READS_SHARDED}'"
        return failed(message, where=parameters[0], help=advice, key=key, parameters=len(parameters))
    return failed(
        f"{len(parameters)} parameters are adapted under ZeRO-3, and still sharded when PEFT adds to them",
        where=parameters[0],
        help="make the blocks with the experts leaf modules (deepspeed.utils.set_z3_leaf_modules), or use ZeRO-2",
        key=key,
        severity=Severity.WARNING,
        parameters=len(parameters),
    )


def _parameters(context: CheckContext) -> tuple[str, ...]:
    """Return the parameters that PEFT would adapt on the base; without a base, those that are configured."""
    try:
        return context.resolved.parameters
    except UndecidableError:
        return tuple(context.peft_config.get("target_parameters") or ())


RULE = Rule(
    code="GK402",
    title="no adapted parameter is sharded by ZeRO-3",
    severity=Severity.ERROR,
    needs=("peft_config", "training"),
    check=_check,
    help="make the blocks with the experts leaf modules of ZeRO-3, or use ZeRO-2",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
