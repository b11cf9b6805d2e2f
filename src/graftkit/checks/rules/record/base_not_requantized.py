"""Check that the base is not stored in another quantization than the adapter was trained on.

## Why it matters

An adapter learns to correct the errors of the weights it sees. On weights rounded otherwise its answers move,
and nothing says by how much.

## Example

An adapter is trained on weights in bfloat16, and loaded on a GPTQ copy of the same model.

## How safe that is

It is not a fault by itself: many are served like that. Ask the model that is served: `graft probe` says how far
its answers are from those of training. An adapter that was trained on a base quantized as it was loaded
(QLoRA), and is used on the unquantized files, is reported as info.

## Sources

- https://github.com/huggingface/peft/issues/2105
- https://github.com/artidoro/qlora/issues/254
"""

from __future__ import annotations

from typing import Any

from graftkit.adapters.fingerprints.weights import Likeness
from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.surveying.checkpoint.local_weights import stored_quantization


def _check(context: CheckContext) -> Observation:
    known = context.record.base
    if known is None:
        return unknown("its graftkit.json names no base")
    now = stored_quantization(context.base_folder)
    trained = known.quantization or known.stored_quantization
    figures: dict[str, Any] = {"trained": trained, "stored": now}
    if now is not None and (trained is None or not trained.startswith(now)):
        seen = "without quantization" if trained is None else f"on weights quantized by {trained}"
        return failed(f"it was trained {seen}, and these are stored quantized by {now}", **figures)
    if trained is not None and now is None:
        return info(f"it was trained on weights quantized by {trained}, and these are not quantized", **figures)
    cast = _cast(context)
    if cast:
        return info(f"the weights were stored in {cast} when it was trained", **figures)
    return passed(f"stored as in training: {now or 'not quantized'}", **figures)


def _cast(context: CheckContext) -> str | None:
    """Return the dtypes of the sampled tensors in training, and now, where they differ."""
    try:
        found = context.base_comparison
    except UndecidableError:
        return None
    if found.likeness is not Likeness.ROUNDED or not found.dtypes:
        return None
    return ", ".join(f"{before}, and are in {after}" for before, after in found.dtypes.items())


RULE = Rule(
    code="GK513",
    title="the base is stored in the quantization that the adapter was trained on",
    severity=Severity.WARNING,
    needs=("record", "base_folder"),
    check=_check,
    help="graft probe URL --adapter DIR says what that does to its answers; or merge it, then quantize the result",
    since="0.1.0",
    source=Source.FILE,
)
