r"""A pattern must not match a wrapper together with the linear inside it.

## Why it matters

The linear alone is what PEFT can adapt; the wrapper that the pattern also matches makes it raise.

## Example

`.*\.(q_proj|v_proj)(\.linear)?` is meant for plain and wrapped layers, and matches every wrapper.

## How safe that is

The same linears are adapted.

## Sources

- https://github.com/huggingface/peft/issues/3129
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key, retargeted
from graftkit.findings import Severity, Source
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    inner = resolved.base.inner
    both = [path for path in resolved.wrappers if inner[path].path in resolved.targeted]
    if not both:
        return passed("no wrapper is named together with the linear inside it")
    return failed(
        f"the targets match {len(both)} linears and also their wrappers, which PEFT refuses: {some(both)}",
        where=both[0],
        fix=retargeted(context, (path for path in resolved.modules if path not in inner), saved=True),
        key=recipe_key(context, "target_modules"),
        wrappers=len(both),
    )


RULE = Rule(
    code="GK112",
    title="no wrapper is named together with the linear inside it",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="match the linears alone",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
