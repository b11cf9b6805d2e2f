"""Check that the engine has a place for every tensor, and finds every tensor that it expects.

## Why it matters

The server or the converter fails at a tensor that it has no place for, or that is missing.

## Example

Layers that share keys and values have a `q_proj` and no `v_proj`. SGLang fuses the three projections when it
loads an adapter, and raises a KeyError.

## How safe that is

Zeros add nothing. What is left out is lost: if the towers were trained, merge instead.

## Sources

- https://github.com/sgl-project/sglang/issues/25913
- https://github.com/sgl-project/sglang/pull/28199
- https://github.com/ggml-org/llama.cpp/issues/23047
"""

from __future__ import annotations

from graftkit.checks.adapter_files.engine_support import modules_by_feature, require_lora, verdict
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, passed
from graftkit.engines import Feature, Stance
from graftkit.findings import Severity, Source

_ASKED = (Feature.OTHER_PREFIX, Feature.TOWERS, Feature.STACKED_EXPERTS, Feature.NO_VALUE)


def _check(context: CheckContext) -> Observation:
    require_lora(context)
    engine, modules = context.engine, modules_by_feature(context.fit)
    asked = {feature: modules[feature] for feature in _ASKED if feature in modules}
    # What it skips is for GK702 to report.
    asked = {f: cores for f, cores in asked.items() if engine.fact(f).stance is not Stance.IGNORES}
    good = f"{engine} has a place for all {len(context.saved.modules)} adapted modules"
    return verdict(engine, asked, frozenset({Stance.REFUSES}), good) if asked else passed(good)


RULE = Rule(
    code="GK705",
    title="the adapter's names map to tensors of the engine",
    severity=Severity.ERROR,
    needs=("adapter", "base", "engine"),
    check=_check,
    help="write tensors of zeros for what is missing, leave out what has no place, or merge the adapter",
    doc=__doc__,
    since="0.1.0",
    source=Source.VERSIONS,
)
