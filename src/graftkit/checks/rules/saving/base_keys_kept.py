"""Check that the saved model has every tensor of the base's files.

## Why it matters

An engine whose class needs what transformers' class ignores fails: “weights were not initialized”.

## Example

The base has keys and values of layers that share those of others, or layers for multi-token prediction.
transformers loads neither, so `save_pretrained` writes neither, and vLLM refuses the result.

## How safe that is

The tensors are the base's own; transformers does not read them.

## Sources

- https://github.com/vllm-project/vllm/issues/44788
- https://github.com/vllm-project/vllm/pull/54917
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    original = context.base.checkpoint
    if original is None:
        return unknown(
            "the headers of the base's own weights were not read", help="gk.survey(base, headers=True) reads them"
        )
    saved = context.checkpoint_headers
    # The class does not load what it does not know, and so cannot save it.
    dropped = [key for key in original.unknown if key not in saved]
    figures: dict[str, Any] = {"base": original.tensors, "saved": len(saved), "dropped": len(dropped)}
    if dropped:
        message = f"{len(dropped)} of the base's {original.tensors} tensors were not saved: {some(dropped)}"
        return failed(message, where=dropped[0], **figures)
    return passed(f"all {len(original.unknown)} tensors that the base's class does not load are kept", **figures)


RULE = Rule(
    code="GK603",
    title="no tensor of the base's files is lost by saving",
    severity=Severity.WARNING,
    needs=("base", "checkpoint"),
    check=_check,
    help="copy these tensors unchanged from the base's files, or merge with graft merge",
    since="0.1.0",
    source=Source.FILE,
)
