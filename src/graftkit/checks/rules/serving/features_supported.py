"""Check that the engine supports every feature of the adapter.

## Why it matters

An engine refuses what it does not support, or loads the rest and computes something else.

## Example

An adapter trained with `use_dora=True` is given to vLLM, which refuses it when the server starts.

## How safe that is

Any engine that runs the base runs the merged model; it takes the space of the base.

## Sources

- vllm.lora.peft_helper.PEFTHelper
- https://github.com/vllm-project/vllm/issues/36501
- https://github.com/sgl-project/sglang/pull/22125
- https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.adapter_files.asked import asked_by_files, model_of
from graftkit.checks.adapter_files.engine_support import judge
from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed
from graftkit.engines import Engine, Stance
from graftkit.findings import Severity, Source

_BAD = frozenset({Stance.REFUSES, Stance.IGNORES})


def _check(context: CheckContext) -> Observation:
    saved = context.saved
    fit = None if context.given.base is None or saved.prefix is None else context.fit
    asked = asked_by_files(saved, fit)
    good = f"{context.engine} supports every feature of this adapter"
    seen = judge(context.engine, model_of(fit), asked, _BAD, good)
    if seen.verdict is not Severity.OK or saved.file.peft_type != "LORA":
        return seen
    return _rank(context.engine, saved) or seen


def _rank(engine: Engine, saved: SavedAdapter) -> Observation | None:
    limit = engine.rank_limit
    largest = max((saved.rank(core) for core in saved.modules), default=0)
    if limit is None or largest <= limit.default:
        return None
    figures: dict[str, Any] = {"engine": str(engine), "rank": largest, "source": limit.source}
    if largest > limit.largest:
        message = f"rank {largest} is larger than the {limit.largest} that {engine} takes"
        return failed(message, help="merge the adapter, or reduce its rank by SVD", **figures)
    flag = limit.flag.format(next(step for step in limit.steps if step >= largest))
    message = f"rank {largest} is larger than the {limit.default} that {engine} takes by default"
    return failed(message, help=f"start the server with {flag}", severity=Severity.WARNING, **figures)


RULE = Rule(
    code="GK701",
    title="the engine supports every feature of the adapter",
    severity=Severity.ERROR,
    needs=("adapter", "engine"),
    check=_check,
    help="merge the adapter into its base, or convert it to a plain LoRA",
    since="0.1.0",
    source=Source.VERSIONS,
)
