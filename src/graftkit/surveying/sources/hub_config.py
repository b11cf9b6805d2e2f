"""A model's configuration from the hub, and the base model of a repository that holds an adapter instead."""

from __future__ import annotations

import json
from pathlib import Path

from graftkit.errors import SourceError
from graftkit.surveying.sources.config_file import MAX_CONFIG_BYTES
from graftkit.surveying.sources.hub import HubFile, fetch, from_cache


def fetch_config(repo_id: str, revision: str | None = None) -> HubFile:
    """Fetch a model's ``config.json``, and no other file of it.

    Raises:
        SourceError: as :func:`fetch`; ``hub-no-config`` where the repository has none.
    """
    try:
        return fetch(repo_id, "config.json", revision, max_bytes=MAX_CONFIG_BYTES)
    except SourceError as error:
        if error.code == "hub-no-file":
            raise _no_config(repo_id, _hub_adapter_base(repo_id, revision)) from error
        # A hub that did not answer is not asked again.
        adapter = from_cache(repo_id, "adapter_config.json", revision)
        if error.code == "hub-offline" and adapter is not None:
            raise _no_config(repo_id, adapter_base(adapter.path)) from error
        raise


def _hub_adapter_base(repo_id: str, revision: str | None) -> str | None:
    """Return the base model that an adapter repository names ("" for none), None where it is not an adapter."""
    try:
        file = fetch(repo_id, "adapter_config.json", revision, max_bytes=MAX_CONFIG_BYTES)
    except SourceError:
        return None
    return adapter_base(file.path)


def adapter_base(path: Path) -> str:
    """Return the base model that an ``adapter_config.json`` names, "" where it names none or cannot be read."""
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""
    return base if isinstance(base, str) else ""


def _no_config(repo_id: str, base: str | None) -> SourceError:
    if base is None:
        why = "its files are not those of a transformers model"
        help = "name a repository in the transformers format"
    else:
        why = f"it is an adapter for {base}" if base else "it is an adapter"
        help = f"name the base model: {base}" if base else "name the adapter's base model"
    return SourceError(
        "this repository has no config.json", where=repo_id, why=why, help=help, code="hub-no-config"
    )
