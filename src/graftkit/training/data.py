"""A recipe's ``data`` -> datasets with the columns that its trainer takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import DataError
from graftkit.recipes.recipe import DataSection, Recipe

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_MEDIA = {".png": "imagefolder", ".jpg": "imagefolder", ".jpeg": "imagefolder", ".wav": "audiofolder"}
# Trainer -> the sets of columns that make a sample. First set that is there wins.
_COLUMNS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
}
_MODALITIES = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        train: one row a sample.
        held_out: rows that are never trained on, or None.
        modalities: what the rows hold: "text", and "image" or "audio" where there is such a column.
    """

    train: Dataset
    held_out: Dataset | None
    modalities: tuple[str, ...]


def load_data(recipe: Recipe) -> Data:
    """Read the recipe's data from this machine: local files, or a hub dataset in the cache.

    Paths are relative to the recipe.

    Raises:
        DataError: ``data-missing``, ``data-unreadable``, ``data-columns`` or ``data-empty``.
    """
    section = recipe.fields.data
    if section.path is None:
        raise DataError(
            "the recipe names no data",
            where=str(recipe.path),
            help="data: {path: train.jsonl}",
            code="data-missing",
        )
    home = recipe.path.parent
    train = _shaped(_read(section.path, section.split, home), section, recipe.fields.trainer)
    held_out = _held_out(section, home, recipe.fields.trainer)
    if held_out is None and section.eval_share is not None:
        parts = train.train_test_split(test_size=section.eval_share, seed=int(recipe.args.get("seed", 42)))
        train, held_out = parts["train"], parts["test"]
    return Data(train, held_out, _modalities(section, train.column_names))


def _held_out(section: DataSection, home: Path, trainer: str) -> Dataset | None:
    if section.eval_path is None and section.eval_split is None:
        return None
    rows = _read(section.eval_path or str(section.path), section.eval_split or "train", home)
    return _shaped(rows, section, trainer)


def _read(path: str, split: str, home: Path) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    place = home / Path(path).expanduser()
    try:
        if place.is_file():
            return load_dataset(_builder(place), data_files=str(place), split=split)
        if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
            saved = load_from_disk(str(place))
            return saved[split] if isinstance(saved, DatasetDict) else saved
        if place.is_dir():
            return load_dataset(_folder_builder(place), data_dir=str(place), split=split)
        return load_dataset(path, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds, from its parsers and from the hub's client
        raise DataError(
            "the data cannot be read",
            where=path,
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            help="name a local file or folder, or a dataset that the cache holds; a split must exist",
            code="data-unreadable",
        ) from error


def _builder(file: Path) -> str:
    builder = _BUILDERS.get(file.suffix.lower())
    if builder is None:
        raise DataError(
            f"data of this kind is not read: {file.suffix or 'no suffix'}",
            where=str(file),
            help=f"use one of {', '.join(_BUILDERS)}, or a folder",
            code="data-unreadable",
        )
    return builder


def _folder_builder(folder: Path) -> str:
    """By its first file of a known kind: pictures, sounds, or tables."""
    kinds: dict[str, str] = {**_MEDIA, **_BUILDERS}
    for file in sorted(folder.rglob("*")):
        if (builder := kinds.get(file.suffix.lower())) and not file.name.startswith("metadata."):
            return builder
    raise DataError(
        "the folder holds no data", where=str(folder), help=f"files of {', '.join(kinds)}", code="data-unreadable"
    )


def _shaped(rows: Any, section: DataSection, trainer: str) -> Dataset:
    """With the trainer's column names, no more rows than asked for, and at least one."""
    for name, theirs in section.columns.items():
        if theirs not in rows.column_names:
            raise _no_column(theirs, rows.column_names)
        rows = rows.rename_column(theirs, name)
    if section.limit is not None:
        rows = rows.select(range(min(section.limit, len(rows))))
    if not len(rows):
        raise DataError("the data has no rows", where=section.path, code="data-empty")
    if not any(set(columns) <= set(rows.column_names) for columns in _COLUMNS[trainer]):
        wanted = " or ".join(" + ".join(columns) for columns in _COLUMNS[trainer])
        raise DataError(
            f"{trainer} does not find its columns",
            where=section.path,
            why=f"it takes {wanted}; the data has {', '.join(rows.column_names)}",
            help="data: {columns: {prompt: question}} renames them",
            code="data-columns",
        )
    return rows


def _no_column(name: str, known: Iterable[str]) -> DataError:
    return DataError(f"the data has no column {name!r}", why=f"it has {', '.join(known)}", code="data-columns")


def _modalities(section: DataSection, columns: Iterable[str]) -> tuple[str, ...]:
    if section.modalities is not None:
        return tuple(section.modalities)
    shown = {_MODALITIES[name] for name in columns if name in _MODALITIES}
    return ("text", *sorted(shown))
