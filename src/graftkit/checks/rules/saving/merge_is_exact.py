"""Check that a merged checkpoint is the correctly rounded sum of its base and its adapters.

## Why it matters

An update that is rounded twice, left out, or added to the wrong tensor raises no error, and gives a model that
answers differently than the adapter did.

## Example

PEFT computes the update of a bfloat16 adapter in bfloat16 and adds it in bfloat16: about a fifth of the merged
elements are not the nearest to the exact result.

Every element is compared: bit for bit where nothing changes, else with a sum in double precision. None may be
farther off than its rounding and the errors of a sum in single precision explain (where base and update nearly
cancel, these are larger than the result); and fewer than one in 10,000 farther than double precision explains.

## How safe that is

A merge writes a new folder; base and adapter are only read.

## Sources

- peft.tuners.lora.layer.Linear.get_delta_weight
- graftkit.merging.verify
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.findings import Severity, Source
from graftkit.text import and_more


def _check(context: CheckContext) -> Observation:
    seen = context.merge
    figures = {name: value for name, value in seen.to_dict().items() if name != "problems"}
    if seen.problems:
        return failed(seen.problems[0] + and_more(seen.problems, 1), problems=len(seen.problems), **figures)
    return passed(str(seen), **figures)


RULE = Rule(
    code="GK606",
    title="the merged checkpoint is the exact merge, and unchanged elsewhere",
    severity=Severity.ERROR,
    needs=("merge",),
    check=_check,
    help="merge again: graft merge BASE ADAPTER OUT",
    since="0.1.0",
    source=Source.FILE,
)
