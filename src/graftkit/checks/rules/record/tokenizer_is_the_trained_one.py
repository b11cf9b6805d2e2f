"""Check that the base's tokenizer makes the token ids that the adapter was trained on.

## Why it matters

With other ids for the same text a model is asked something else, and no shape shows it.

## Example

Tokens were added for training, and the adapter is served with the base's own tokenizer: the markers of a
conversation are cut into pieces that the adapter never saw.

## How safe that is

`graftkit.json` beside the adapter has a hash of all tokens and their ids, and the ids of one sentence with
several scripts. Tokenizers that agree in both are taken for the same.

## Sources

- https://github.com/vllm-project/vllm/pull/17855
- https://github.com/hiyouga/LlamaFactory/issues/7997
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.adapters.fingerprints.tokenizer import sample_ids, vocabulary_hash
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source

_FILES = ("tokenizer.json", "tokenizer.model")


def _check(context: CheckContext) -> Observation:
    known = context.record.tokenizer
    if known is None:
        return unknown("its graftkit.json has no tokenizer")
    same_tokens = vocabulary_hash(context.processor) == known.vocabulary
    same_ids = sample_ids(context.processor) == known.ids
    figures: dict[str, Any] = {"same_tokens": same_tokens, "same_ids": same_ids}
    if same_tokens and same_ids:
        return passed("the tokenizer is the one that it was trained with", **figures)
    what = "splits a sentence into other tokens" if same_tokens else "has other tokens, or other ids for them"
    message = f"the tokenizer {what} than the one that it was trained with"
    if context.given.folder is not None and _has_its_own(context.given.folder):
        advice = f"serve it with the tokenizer beside it: {context.given.folder}"
        return failed(message, help=advice, severity=Severity.WARNING, **figures)
    return failed(message, **figures)


def _has_its_own(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


RULE = Rule(
    code="GK511",
    title="the tokenizer is the one that the adapter was trained with",
    severity=Severity.ERROR,
    needs=("record", "processor"),
    reads=("folder",),
    check=_check,
    help="serve it with the tokenizer that it was trained with",
    since="0.1.0",
    source=Source.FILE,
)
