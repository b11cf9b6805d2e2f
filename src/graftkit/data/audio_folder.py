"""Folders of audio files with a metadata file, in the layout of ``datasets``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def find_metadata(folder: Path, split: str) -> Path | None:
    """Return the one metadata file of a split, whose ``file_name`` or ``file_names`` are audio files beside it.

    None for any other folder. ``datasets`` finds the file, but reads its rows with torchcodec only.
    Source: ``datasets.packaged_modules.audiofolder``.
    """
    from datasets import load_dataset_builder
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    if next(folder.rglob("metadata.*"), None) is None:
        return None
    builder = load_dataset_builder(str(folder))
    if not isinstance(builder, AudioFolder):
        return None
    files = (Path(file) for file in builder.config.data_files.get(split_name(split), ()))
    found = [file for file in files if file.name in AudioFolder.METADATA_FILENAMES]
    return found[0] if len(found) == 1 else None


def split_name(split: str) -> str:
    """ "train[:10%]" -> "train"."""
    return re.split(r"\W", split, maxsplit=1)[0]


def rename_file_columns(rows: Dataset) -> Dataset:
    """Rename the columns of a metadata file as ``datasets`` does."""
    names = {"file_name": "audio", "file_names": "audios"}
    return rows.rename_columns({old: new for old, new in names.items() if old in rows.column_names})
