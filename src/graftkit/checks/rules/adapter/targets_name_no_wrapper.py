"""Check that the saved targets name no wrapper of the base.

## Why it matters

Stock PEFT refuses to load the adapter: it cannot adapt a wrapper.

## Example

A tool redirects `q_proj` to the linear inside the wrapper while it trains, and saves `target_modules:
["q_proj"]`.

## How safe that is

Only the configuration changes where the tensors already name the inner linears; no value changes.

## Sources

- https://github.com/huggingface/peft/issues/3129
- peft: tuners.lora.model.LoraModel._create_new_module
"""

from __future__ import annotations

from graftkit.adapters.migrate import migrate
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.errors import AdapterError
from graftkit.findings import Fix, Severity
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if context.saved.targets is None:
        return passed("the configuration names no modules")
    fit = context.fit
    named = fit.wrapped
    if named:
        cls = next(site.wrapper.cls for site in fit.base if site.wrapper and named[0] in site.names)
        message = f"the targets name {len(named)} wrappers ({cls}), which stock PEFT refuses: {some(named)}"
        return failed(message, where=named[0], fix=_fix(context), wrappers=len(named))
    return passed(f"the targets name none of the base's {len(fit.base.inner)} wrappers", wrappers=0)


def _fix(context: CheckContext) -> Fix | None:
    """Return the fix that names the linears inside; None where tensors would have to be renamed too."""
    try:
        fitted = migrate(context.adapter, context.base)
    except AdapterError:
        return None
    return None if fitted.renamed else Fix("adapter", {item.field: item.after for item in fitted.rewritten})


RULE = Rule(
    code="GK507",
    title="the saved targets name no wrapper of the base",
    severity=Severity.ERROR,
    needs=("adapter", "base"),
    check=_check,
    help="gk.migrate(adapter, base, out) rewrites the targets to the linears inside",
    since="0.1.0",
)
