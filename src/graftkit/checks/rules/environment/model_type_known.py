"""The installed transformers must know the architecture.

## Why it matters

Without the model's classes nothing can be loaded: transformers raises before the first weight is read.

## Example

A model that came out last week, and a transformers of last month.

## How safe that is

A newer transformers may need a newer peft and trl: GK002 says which combinations do not work.

## Sources

- transformers: models.auto.configuration_auto.CONFIG_MAPPING
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.surveying.sources.model_types import is_model_type


def _check(context: CheckContext) -> Observation:
    model_type = context.config.get("model_type")
    installed = context.environment.get("transformers")
    if not isinstance(model_type, str):
        return unknown("the configuration names no model type")
    if is_model_type(model_type):
        return passed(f"transformers {installed} knows the model type {model_type}", model_type=model_type)
    if context.config.get("auto_map"):
        advice = "read the code, then pass trust_remote_code=True"
        return info(f"the model type {model_type} comes with its own code", where=model_type, help=advice)
    writer = _release(context.config)
    return failed(
        f"transformers {installed} does not know the model type {model_type}"
        + (f"; its configuration was written by {writer}" if writer else ""),
        where=model_type,
        help=_advice(writer, installed),
        installed=installed,
        written_by=str(writer) if writer else None,
    )


def _release(config: Mapping[str, Any]) -> Version | None:
    """Return the release that wrote the configuration; a development version counts as its release."""
    try:
        return Version(Version(str(config.get("transformers_version"))).base_version)
    except InvalidVersion:
        return None


def _advice(writer: Version | None, installed: str | None) -> str:
    newest = "pip install --upgrade transformers"
    if writer is None or installed is None:
        return newest
    if writer > Version(installed):
        return f"pip install 'transformers>={writer}'"
    return f"{newest}; the name may be misspelled, or the model's own code may be missing"


RULE = Rule(
    code="GK001",
    title="transformers knows the architecture",
    severity=Severity.ERROR,
    needs=("config", "environment"),
    check=_check,
    help="pip install --upgrade transformers",
    since="0.1.0",
    source=Source.VERSIONS,
)
