"""The datasets that a recipe's ``data`` names, with the columns that its trainer takes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.data.audio_columns import resolve_audio_files
from graftkit.data.audio_folder import find_metadata, rename_file_columns, split_name
from graftkit.data.message_parts import keep_json_texts
from graftkit.data.source import check_source, place_of
from graftkit.errors import DataError
from graftkit.recipes.recipe import Recipe
from graftkit.text import describe, suggest

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Trainer -> the sets of columns that make a sample. The first set that the data has is used, without the others.
COLUMNS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
}
MODALITIES = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}
# What TRL reads besides a sample's columns. A reward may read any.
_EXTRA = {*MODALITIES, "tools", "chat_template_kwargs"}


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        train: one row a sample.
        held_out: rows to evaluate on, or None.
        modalities: "text", and "image" or "audio" if there is such a column.
    """

    train: Dataset
    held_out: Dataset | None
    modalities: tuple[str, ...]


def load_data(recipe: Recipe) -> Data:
    """Read the recipe's data from this machine: local files, or a hub dataset in the cache.

    Paths are relative to the recipe, and those of audio files in rows to the file or folder of the data. Columns
    that the trainer does not take are left out, except for grpo, whose rewards may read any.

    Raises:
        DataError: ``data-missing``, ``data-unreachable``, ``data-unreadable``, ``data-columns``,
            ``data-modalities``, ``data-empty`` or ``data-audio``.
        MissingDependencyError: the rows name audio files, and nothing reads them.
    """
    section = recipe.fields.data
    if section.path is None:
        raise DataError(
            "the recipe names no data",
            where=str(recipe.path),
            why="it has no data: path:",
            help="data: {path: train.jsonl}",
            code="data-missing",
        )
    train = _load_rows(section.path, section.split, recipe)
    held_out = _held_out(recipe)
    if held_out is None and section.eval_share is not None:
        train, held_out = _split_off(train, section.eval_share, recipe)
    return Data(train, held_out, _modalities(recipe, train.column_names))


def _held_out(recipe: Recipe) -> Dataset | None:
    section = recipe.fields.data
    if section.eval_path is None and section.eval_split is None:
        return None
    path = section.eval_path or str(section.path)
    return _load_rows(path, section.eval_split or "train", recipe)


def _split_off(rows: Dataset, share: float, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the rows without a share of them, and that share, chosen by the recipe's seed (42 by default)."""
    if len(rows) < 2:
        raise DataError(
            "one row cannot be split",
            where=recipe.fields.data.path,
            why="eval_share keeps a part of the rows out of training",
            help="give more rows, or leave eval_share out",
            code="data-empty",
        )
    held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    parts = rows.train_test_split(test_size=held_out, seed=int(recipe.args.get("seed", 42)))
    return parts["train"], parts["test"]


def read_rows(path: str, split: str, place: Path) -> tuple[Dataset, Path]:
    """Return the rows as they are, and the folder that paths in them are relative to.

    Args:
        path: as a recipe has it.
        place: where that is, if it is on this machine.

    Raises:
        DataError: ``data-missing``, ``data-unreachable`` or ``data-unreadable``.
    """
    check_source(path, place)
    try:
        with _quiet_datasets():
            return _read(path, split, place)
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of its parsers and of the hub's client
        raise _unreadable(path, error, place) from error


def _read(path: str, split: str, place: Path) -> tuple[Dataset, Path]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if place.is_file():
        return _read_file(place, str(place), split), place.parent
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = load_from_disk(str(place))
        return saved[split] if isinstance(saved, DatasetDict) else saved, place
    if place.is_dir() and (metadata := find_metadata(place, split)) is not None:
        rows = _read_file(metadata, {split_name(split): str(metadata)}, split)
        return rename_file_columns(rows), metadata.parent
    return load_dataset(str(place) if place.is_dir() else path, split=split), place


def _read_file(file: Path, data_files: str | dict[str, str], split: str) -> Dataset:
    """Read one file.

    The cells of CSV are text: types that are guessed would make numbers of answers, and nothing of "NA".
    """
    from datasets import Features, Value, load_dataset

    builder = _builder(file)
    if builder != "csv":
        return load_dataset(builder, data_files=data_files, split=split)
    texts = Features({name: Value("string") for name in _header(file)})
    return load_dataset(builder, data_files=data_files, split=split, features=texts, keep_default_na=False)


def _header(file: Path) -> list[str]:
    """Return the names of a CSV file's columns, as pandas makes them of cells that are empty or the same.

    Raises:
        DataError: ``data-empty``.
        ValueError: the first row has more cells, of which pandas takes the first for labels of the rows.
    """
    import pandas

    try:
        first = pandas.read_csv(file, nrows=1)
    except pandas.errors.EmptyDataError as error:
        raise _no_rows(str(file)) from error
    if first.empty:
        raise _no_rows(str(file))
    if not isinstance(first.index, pandas.RangeIndex):
        raise ValueError("the first row has more cells than the header: a text with a comma stands in quotes")
    return list(first.columns)


def _no_rows(path: str) -> DataError:
    return DataError(
        "the data has no rows",
        where=path,
        why="the file is empty, or has only a header",
        help="name a file that has rows",
        code="data-empty",
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the bars of datasets out of the terminal, and the errors that it logs before it raises them."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("datasets")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


def _unreadable(path: str, error: Exception, place: Path) -> DataError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # datasets wraps those of its parsers and decoders
        cause = cause.__cause__
    if isinstance(cause, StopIteration):  # what its JSON reader makes of an empty file
        return _no_rows(path)
    return DataError(
        "the data cannot be read",
        where=path,
        why=describe(cause),
        help="correct the file; its suffix has to be that of its format"
        if place.is_file()
        else "name a local file or folder, or a dataset that the cache holds; a split must exist",
        code="data-unreadable",
    )


def _builder(file: Path) -> str:
    builder = _BUILDERS.get(file.suffix.lower())
    if builder is None:
        raise DataError(
            f"unknown data format: {file.suffix or 'no suffix'}",
            where=str(file),
            why="a file's suffix says how it is read",
            help=f"use one of {', '.join(_BUILDERS)}, or a folder",
            code="data-unreadable",
        )
    return builder


def _load_rows(path: str, split: str, recipe: Recipe) -> Dataset:
    """Return the rows with the trainer's columns, within the limit, after the first one was read."""
    section, trainer = recipe.fields.data, recipe.fields.trainer
    place = place_of(path, recipe)
    rows, home = read_rows(path, split, place)
    rows = _renamed(rows, section.columns, path)
    if section.limit is not None:
        rows = rows.select(range(min(section.limit, len(rows))))
    sample = _sample_columns(recipe, rows.column_names, path)
    _check_texts(rows, sample, path)
    if trainer != "grpo":
        rows = rows.select_columns([name for name in rows.column_names if name in {*sample, *_EXTRA}])
    rows = resolve_audio_files(keep_json_texts(rows), home, path)
    try:
        rows[0]
    except Exception as error:  # decoders may raise anything; a missing one is an ImportError
        raise _unreadable(path, error, place) from error
    return rows


def _renamed(rows: Any, columns: Mapping[str, str], path: str) -> Any:
    """Rename the columns to the trainer's names; a column that has such a name already is left out."""
    missing = next((theirs for theirs in columns.values() if theirs not in rows.column_names), None)
    if missing is not None:
        raise _no_column(missing, rows.column_names, path)
    names = {theirs: name for name, theirs in columns.items()}
    replaced = [name for name in columns if name in rows.column_names and name not in names]
    return rows.remove_columns(replaced).rename_columns(names)


def _sample_columns(recipe: Recipe, present: Iterable[str], path: str) -> tuple[str, ...]:
    """Return the columns that make a sample."""
    trainer = recipe.fields.trainer
    text = str(recipe.args.get("dataset_text_field", "text"))
    sets = tuple(tuple(text if name == "text" else name for name in names) for names in COLUMNS[trainer])
    found = next((names for names in sets if set(names) <= set(present)), None)
    if found is None:
        raise DataError(
            f"{trainer} does not find its columns",
            where=path,
            why=f"it takes {' or '.join(' + '.join(names) for names in sets)}; the data has {', '.join(present)}",
            help="data: {columns: {prompt: question}} renames them",
            code="data-columns",
        )
    return found


def _check_texts(rows: Dataset, columns: Iterable[str], path: str) -> None:
    """Check that these columns hold texts or messages in every row: TRL takes no number and no gap for either."""
    from datasets import Value

    for name in columns:
        feature = rows.features[name]
        if isinstance(feature, Value) and feature.dtype not in {"string", "large_string", "null"}:
            raise _no_text(f"its values are {feature.dtype}", name, path)
        if rows.data.column(name).null_count:
            at = next((at for at, value in enumerate(rows[name]) if value is None), None)
            if at is not None:
                raise _no_text(f"row {at + 1} has none", name, path)


def _no_text(why: str, column: str, path: str) -> DataError:
    return DataError(
        f"the column {column} is not text in every row",
        where=path,
        why=why,
        help='write its values as text, "3" for 3 and "" for none, or leave such rows out',
        code="data-columns",
    )


def _no_column(name: str, known: Iterable[str], path: str) -> DataError:
    return DataError(
        f"the data has no column {name!r}",
        where=path,
        why=f"it has {', '.join(known)}",
        help=suggest(name, known) or "correct it under data: columns:, or take it out",
        code="data-columns",
    )


def _modalities(recipe: Recipe, columns: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities that the recipe names, or those of the columns.

    Raises:
        DataError: ``data-modalities``: no trainer takes such rows.
    """
    shown = tuple(sorted({MODALITIES[name] for name in columns if name in MODALITIES}))
    if "audio" in shown and (len(shown) > 1 or recipe.fields.trainer != "sft"):
        raise DataError(
            f"{recipe.fields.trainer} takes no rows of {' and '.join(shown)}",
            where=recipe.fields.data.path,
            why="only sft trains on audio, and not on images in the same rows",
            code="data-modalities",
        )
    return tuple(recipe.fields.data.modalities or ("text", *shown))
