"""Check that an engine that was started with the adapter computes what PEFT computes.

## Why it matters

An engine that drops an adapter, or a part of it, answers like the base and reports no error.

## Example

transformers saves the experts of Mixtral as `mlp.experts`, and vLLM 0.32 calls them `block_sparse_moe.experts`:
an adapter on them is loaded, and every log-probability is that of the base.

The log-probabilities of the next token are compared with and without the adapter. How far the engine is off on the
base alone is its noise; where the adapter's effect does not stand out from it, the rule is unknown.

## How safe that is

The adapter's files are only read.

## Sources

- https://github.com/vllm-project/vllm/issues/10798
- https://github.com/vllm-project/vllm/issues/41384
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.engines.outcome import Outcome, Served
from graftkit.findings import Severity

_HELP = {
    Outcome.IGNORED: "graft convert writes it in the engine's form; else graft merge",
    Outcome.SCALED: "graft convert writes the scale into the factors; else graft merge",
    Outcome.DIFFERENT: "graft convert writes it in the engine's form; else graft merge",
    Outcome.REFUSED: "graft convert writes it in the engine's form; else graft merge",
    Outcome.OTHER_BASE: "serve the base that graftkit.json names",
    Outcome.OTHER_TEMPLATE: "serve the tokenizer and the chat template that it was trained with",
}


def _check(context: CheckContext) -> Observation:
    found = context.served
    figures = {name: value for name, value in found.to_dict().items() if value not in (None, [])}
    if found.outcome is Outcome.UNKNOWN:
        return unknown(found.says or f"{found.engine} cannot be compared with PEFT", **figures)
    if found.outcome is Outcome.APPLIED:
        return passed(_applied(found), **figures)
    return failed(_otherwise(found), where=found.site, help=_HELP[found.outcome], **figures)


def _applied(found: Served) -> str:
    layout = f"; replaced for the run: {', '.join(found.replaced)}" if found.replaced else ""
    return f"{found.engine} applies the adapter{_figures(found)}{layout}"


def _otherwise(found: Served) -> str:
    says = {
        Outcome.IGNORED: f"{found.engine} ignores the adapter",
        Outcome.SCALED: f"{found.engine} applies the adapter {found.factor or 0:.3g} times as strongly",
        Outcome.DIFFERENT: f"{found.engine} computes something else than PEFT",
        Outcome.REFUSED: f"{found.engine} refuses the adapter: {found.says}",
        Outcome.OTHER_BASE: f"{found.engine} serves another base than the adapter's",
        Outcome.OTHER_TEMPLATE: f"{found.engine} renders prompts by another template than the adapter's",
    }
    return says[found.outcome] + _figures(found)


def _figures(found: Served) -> str:
    if found.error is None or found.effect is None:
        return ""
    noise = "" if found.base_error is None else f", and {found.base_error:.2g} off on the base"
    return f": {found.error:.2g} off where the adapter's effect is {found.effect:.2g}{noise}"


RULE = Rule(
    code="GK706",
    title="the engine, started with the adapter, computes what PEFT computes",
    severity=Severity.ERROR,
    needs=("served",),
    check=_check,
    help="graft convert writes the adapter in the engine's form; else graft merge",
    since="0.1.0",
)
