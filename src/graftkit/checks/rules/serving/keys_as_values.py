"""Check that an adapter on keys that are also the values reaches both in the engine.

## Why it matters

The engine has a second weight for the values, which an adapter on the keys does not change.

## Example

`attention_k_eq_v`: in transformers `k_proj` makes keys and values, and vLLM loads its weight twice. An adapter
on `k_proj` then changes only the keys, and the logits differ.

## How safe that is

vLLM 0.32 then agreed with transformers' log-probabilities to 4 decimals. Stock PEFT has no place for the second
pair: keep the original for PEFT.

## Sources

- https://github.com/vllm-project/vllm/pull/41944
"""

from __future__ import annotations

from graftkit.checks.adapter_files.asked import Asked, model_of, sibling
from graftkit.checks.adapter_files.engine_support import judge, require_lora
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, passed
from graftkit.engines import Feature, Stance
from graftkit.findings import Severity, Source
from graftkit.surveying.sites import Note


def _check(context: CheckContext) -> Observation:
    require_lora(context)
    modules, sites = context.saved.modules, context.fit.sites
    keys = [core for core in modules if (site := sites.get(core)) is not None and site.note is Note.KEY_IS_VALUE]
    if not keys:
        return passed("no adapted key projection also makes the values", keys=0)
    lone = [core for core in keys if sibling(core, "k", "v") not in modules]
    if not lone:
        return passed(f"each of {len(keys)} key projections that also make the values has its pair as v_proj, too")
    good = f"{context.engine} makes the values from the adapted keys"
    asked = [Asked(Feature.KEY_IS_VALUE, core) for core in lone]
    return judge(context.engine, model_of(context.fit), asked, frozenset({Stance.IGNORES}), good)


RULE = Rule(
    code="GK703",
    title="an adapter on keys that are also the values reaches both in the engine",
    severity=Severity.ERROR,
    needs=("adapter", "base", "engine"),
    check=_check,
    help="graft convert ADAPTER OUT --to ENGINE writes each k_proj pair a second time, as v_proj",
    since="0.1.0",
    source=Source.VERSIONS,
)
