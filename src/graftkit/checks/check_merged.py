"""``check_merged()``: rules on a merged checkpoint, its base and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.rules import all_rules
from graftkit.findings import Report
from graftkit.merging.merge import verify_merge
from graftkit.recipes.settings import CheckSettings
from graftkit.surveying.survey import survey


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
    return run([rule for rule in rules if {"checkpoint", "merge"} & set(rule.needs)], context)
