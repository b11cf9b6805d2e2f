"""Folders of sounds with a table of rows beside them, as ``datasets`` lays them out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def table_of_sounds(folder: Path, split: str) -> Path | None:
    """The one metadata file of a split, whose ``file_name`` or ``file_names`` are sounds beside it.

    None for any other folder. ``datasets`` finds the file, and would read its rows with torchcodec alone.
    Source: ``datasets.packaged_modules.audiofolder``.
    """
    from datasets import load_dataset_builder
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    if next(folder.rglob("metadata.*"), None) is None:
        return None
    builder = load_dataset_builder(str(folder))
    if not isinstance(builder, AudioFolder):
        return None
    files = (Path(file) for file in builder.config.data_files.get(name_of(split), ()))
    tables = [file for file in files if file.name in AudioFolder.METADATA_FILENAMES]
    return tables[0] if len(tables) == 1 else None


def name_of(split: str) -> str:
    """ "train[:10%]" -> "train"."""
    return re.split(r"\W", split, maxsplit=1)[0]


def sounds_named(rows: Dataset) -> Dataset:
    """A metadata file's rows with the names that ``datasets`` gives its columns of files."""
    names = {"file_name": "audio", "file_names": "audios"}
    return rows.rename_columns({theirs: ours for theirs, ours in names.items() if theirs in rows.column_names})
