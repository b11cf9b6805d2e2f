"""Check that the engine applies every tensor that it loads.

## Why it matters

An engine that finds no module for a tensor gives no error, and serves the base there.

## Example

vLLM loads an adapter on a vision tower without `--enable-tower-connector-lora`: requests succeed, and images
are processed by the base.

llama.cpp's converter leaves the tensors of towers out and says nothing; so do its graphs with weights that they
multiply without looking for an adapter.

## How safe that is

Re-keying changes no value. A merged model does not depend on the engine's names for modules.

## Sources

- https://github.com/vllm-project/vllm/issues/34186
- https://github.com/vllm-project/vllm/issues/41754
- https://github.com/vllm-project/vllm/issues/31479
- https://github.com/sgl-project/sglang/issues/28784
- llama.cpp: src/llama-graph.cpp, build_lora_mm; src/models/gemma4.cpp
"""

from __future__ import annotations

from graftkit.checks.adapter_files.engine_support import judge_modules
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule
from graftkit.engines import Stance
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    # A refusal is for GK705 to report.
    return judge_modules(context, bad=Stance.IGNORES)


RULE = Rule(
    code="GK702",
    title="the engine applies every module of the adapter that it loads",
    severity=Severity.ERROR,
    needs=("adapter", "base", "engine"),
    check=_check,
    help="start the server with the option named, convert or re-key the adapter, or merge it",
    since="0.1.0",
    source=Source.VERSIONS,
)
