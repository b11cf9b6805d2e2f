"""Models on this machine: paths, and what the hub's cache has."""

from __future__ import annotations

from pathlib import Path

from graftkit.surveying.sources import hub


def existing_path(text: str) -> Path | None:
    """Return the file or folder that a text names, or None."""
    path = Path(text).expanduser()
    try:
        return path if text and path.exists() else None
    except OSError:
        # Too long for a path, or not permitted: whatever it names, it is not a local model.
        return None


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with a model's files: a directory, a hub id's cached snapshot, or None."""
    path = existing_path(name)
    if path is not None and path.is_dir():
        return path
    found = hub.from_cache(name, "config.json", revision)
    return None if found is None else found.path.parent
