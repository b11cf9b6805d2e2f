"""``check()``: whether a saved adapter is whole, and whether it fits its base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from graftkit.checks.facts import Facts
from graftkit.checks.rules import rules_of
from graftkit.checks.runner import run
from graftkit.checks.saved import TensorData, printable
from graftkit.errors import AdapterError, SourceError
from graftkit.findings import Finding, Report, Source
from graftkit.surveying.headers import read_headers
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.walk import survey

# The folder is an adapter's, and its weights are what is wrong: a finding, not a failure of the tool.
_FINDINGS = frozenset({"adapter-pickle", "adapter-weights"})


def check(adapter: str | Path | AdapterFile, base: Any = None, *, data: bool = True) -> Report:
    """Say of a saved adapter whether it is whole, safe to load, and taken by its base tensor for tensor.

    Nothing in the folder is executed or unpickled. Weights that are missing, malformed or a pickle are findings
    (GK505), and so is a file without tensors (GK401); what would need them is then "unknown".

    Args:
        adapter: an adapter folder, or one that ``read_adapter`` has read.
        base: a ``ModelMap``, or anything ``survey`` takes. None: rules that need a base are "unknown". The base
            that the configuration names is not looked up: the name need not be the model it will be loaded on.
        data: also read the tensors' data, one tensor at a time. Without it only headers are read.

    Returns:
        One finding a rule.

    Raises:
        AdapterError: ``adapter-not-found`` (no such folder) or ``adapter-config`` (no usable configuration, so
            that this is no adapter at all).
        SourceError, BuildError: the base cannot be surveyed.
    """
    facts = _facts(adapter, data=data)
    if base is not None:
        facts = replace(facts, base=base if isinstance(base, ModelMap) else survey(base))
    report = run(rules_of("adapter"), facts)
    return Report(tuple(_from_file(finding) for finding in report))


def _from_file(finding: Finding) -> Finding:
    """A finding that quotes the files, safe to print: names in them may hold what a terminal would obey."""
    where = None if finding.where is None else printable(finding.where)
    advice = None if finding.help is None else printable(finding.help)
    return replace(finding, message=printable(finding.message), where=where, help=advice, source=Source.FILE)


def _facts(adapter: str | Path | AdapterFile, *, data: bool) -> Facts:
    if isinstance(adapter, AdapterFile):
        return Facts(folder=adapter.folder, adapter=adapter, data=TensorData(adapter) if data else None)
    folder = Path(adapter).expanduser()
    try:
        return _facts(read_adapter(folder), data=data)
    except AdapterError as error:
        if error.code not in _FINDINGS:
            raise
        empty = _without_tensors(folder)
        return Facts(folder=folder, adapter=empty, refusal=None if empty else error)


def _without_tensors(folder: Path) -> AdapterFile | None:
    """The adapter, where its only fault is that a well-formed weights file holds no tensors."""
    try:
        if not (folder / WEIGHTS_NAME).is_file() or read_headers(folder / WEIGHTS_NAME):
            return None
    except SourceError:
        return None
    return AdapterFile(folder, json.loads((folder / CONFIG_NAME).read_bytes()), {}, {})
