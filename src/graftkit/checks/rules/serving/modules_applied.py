"""Check that the engine applies every tensor that it loads.

## Why it matters

An engine that finds no module for a tensor gives no error, and serves the base there.

## Example

vLLM loads an adapter on a vision tower without `--enable-tower-connector-lora`: requests succeed, and images
are processed by the base.

## How safe that is

Re-keying changes no value. A merged model does not depend on the engine's names for modules.

## Sources

- https://github.com/vllm-project/vllm/issues/34186
- https://github.com/vllm-project/vllm/issues/41754
- https://github.com/vllm-project/vllm/issues/31479
- https://github.com/sgl-project/sglang/issues/28784
"""

from __future__ import annotations

from graftkit.checks.adapter_files.engine_support import modules_by_feature, require_lora, verdict
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, passed
from graftkit.engines import Feature, Stance
from graftkit.findings import Severity, Source

_ASKED = (Feature.OTHER_PREFIX, Feature.INNER_NAMES, Feature.TOWERS, Feature.STACKED_EXPERTS)


def _check(context: CheckContext) -> Observation:
    require_lora(context)
    engine, modules = context.engine, modules_by_feature(context.fit)
    asked = {feature: modules[feature] for feature in _ASKED if feature in modules}
    # A refusal is for GK705 to report.
    asked = {f: cores for f, cores in asked.items() if engine.fact(f).stance is not Stance.REFUSES}
    if not asked:
        return passed(f"{engine} skips none of the {len(context.saved.modules)} adapted modules")
    good = f"{engine} applies all {len(context.saved.modules)} adapted modules"
    return verdict(engine, asked, frozenset({Stance.IGNORES}), good)


RULE = Rule(
    code="GK702",
    title="the engine applies every module of the adapter that it loads",
    severity=Severity.ERROR,
    needs=("adapter", "base", "engine"),
    check=_check,
    help="start the server with the option named, re-key the adapter, or merge it",
    doc=__doc__,
    since="0.1.0",
    source=Source.VERSIONS,
)
