"""``check_merged()``: rules on a merged checkpoint, its base and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graftkit.adapters.record import read_record
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.rules import all_rules, rules_of
from graftkit.errors import AdapterError
from graftkit.findings import Report
from graftkit.merging.merge import verify_merge
from graftkit.recipes.settings import CheckSettings
from graftkit.surveying.sources.local_processor import local_processor
from graftkit.surveying.survey import survey

# The rules of the record that look at a tokenizer or processor alone.
_OF_PROCESSORS = ("GK511", "GK512")


def check_merged(
    merged: str | Path,
    base: str | Path,
    adapter: str | Path | Mapping[str, float],
    *,
    settings: CheckSettings | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Report:
    """Compare a merged checkpoint with its base and its adapters: keys, untouched tensors, every changed element.

    Where one adapter says what it was trained with, the tokenizer and the chat template beside the merged weights
    are compared with that (GK511, GK512).

    Args:
        merged: the folder to check, written by any tool.
        base: folder or hub id of the base.
        adapter: an adapter's folder, or folder -> weight.
        settings: which rules, with which limits.
        trust_remote_code: allow the model's own code to run.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError, BuildError, AdapterError, MergeError: an input cannot be read, or such adapters cannot be
            merged.
    """
    given = Inputs(
        base=survey(str(base), headers=True, trust_remote_code=trust_remote_code, revision=revision),
        checkpoint=Path(merged).expanduser(),
        merge=verify_merge(base, adapter, merged, trust_remote_code=trust_remote_code, revision=revision),
    )
    context = CheckContext(given, settings or CheckSettings())
    rules = decidable(all_rules(), ("base", "checkpoint", "merge"))
    report = run([rule for rule in rules if {"checkpoint", "merge"} & set(rule.needs)], context)
    return Report((*report, *check_shipped(merged, adapter, settings=settings)))


def check_shipped(
    merged: str | Path, adapter: str | Path | Mapping[str, float], *, settings: CheckSettings | None = None
) -> Report:
    """Compare the tokenizer and the chat template beside merged weights with those of training.

    Returns:
        No finding where there are several adapters, or the one says nothing of its training.
    """
    folders = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    try:
        record = read_record(folders[0]) if len(folders) == 1 else None
    except AdapterError:
        record = None
    if record is None:
        return Report(())
    given = Inputs(record=record, processor=local_processor(merged))
    rules = [rule for rule in rules_of("record") if rule.code in _OF_PROCESSORS]
    return run(rules, CheckContext(given, settings or CheckSettings()))
