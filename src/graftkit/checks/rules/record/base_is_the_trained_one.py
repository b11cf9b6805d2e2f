"""Check that the base is the one that the adapter was trained on.

## Why it matters

An adapter is a difference to one set of weights. On others of the same shapes it loads without a warning, and
computes something that nobody trained.

## Example

An adapter was trained on a base model, and is loaded on its instruction-tuned sibling: every name and shape
fits.

## How safe that is

`graftkit.json` beside the adapter has a hash of the headers of the base's weight files, and one of bytes
sampled from up to 256 of its tensors. Weights that differ nowhere in these samples are taken for the same.
Where the base was saved in another dtype or quantized since, a few numbers and the tensors that are stored as
they were are compared. A base whose tensors have other names cannot be compared, and neither can one whose
files are not on this machine: that is unknown.

## Sources

- https://github.com/vllm-project/vllm/issues/10798
- https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

from typing import Any

from graftkit.adapters.fingerprints.weights import Comparison, Likeness
from graftkit.adapters.record import BaseRecord
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if context.given.record_refusal is not None:
        error = context.given.record_refusal
        return failed(f"{error.what}: {error.why}", help=error.help, severity=Severity.WARNING, refusal=error.code)
    known = context.record.base
    if known is None:
        return unknown("its graftkit.json names no base")
    now = context.base.model.model_type
    if known.model_type is not None and now is not None and known.model_type != now:
        return failed(
            f"it was trained on a model of type {known.model_type}, and this is one of type {now}",
            where=known.id,
            trained_on=known.id,
        )
    if known.fingerprint is None:
        message = "the base's weight files were not available when the adapter was signed"
        return unknown(message, trained_on=known.id)
    return _judged(context.base_comparison, known)


def _judged(found: Comparison, known: BaseRecord) -> Observation:
    figures: dict[str, Any] = {"trained_on": known.id, "revision": known.revision, "compared": found.compared}
    named = known.id if known.revision is None else f"{known.id} at {known.revision}"
    if found.likeness is Likeness.OTHER:
        shown = f", as {some(found.different)}" if found.different else ""
        return failed(
            f"the weights are not those that it was trained on{shown}",
            where=known.id,
            help=f"use it with {named}",
            different=len(found.different),
            **figures,
        )
    if found.likeness is Likeness.UNKNOWN:
        return unknown(f"the weights cannot be compared: {found.why}", **figures)
    if found.likeness is Likeness.SAME:
        return passed(f"its weight files are those of {named}", **figures)
    return passed(f"{found.compared} sampled tensors have the values of {named}", **figures)


RULE = Rule(
    code="GK510",
    title="the base is the one that the adapter was trained on",
    severity=Severity.ERROR,
    needs=("base",),
    reads=("record", "record_refusal", "base_folder"),
    check=_check,
    help="use it with the base that it was trained on, or train it on this one",
    since="0.1.0",
    source=Source.FILE,
)
