"""The columns of a dataset that hold audio files: found and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.data.audio_file import AudioFile, audio_error
from graftkit.data.message_parts import CONVERSATIONS

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("audio", "audios")


def resolve_audio_files(rows: Dataset, home: Path, source: str) -> Dataset:
    """Check the header of every audio file, and replace its path by the full one.

    A row has one file in ``audio`` or several in ``audios``: each a path, an ``Audio`` of ``datasets``, or a
    mapping with ``path`` or ``bytes``. Files that messages name, as ``{"type": "audio", "path": FILE}`` or with
    ``audio`` for ``path``, become ``audios``. Arrays stay as they are.

    Args:
        rows: with their columns under the trainer's names.
        home: the folder that paths are relative to.
        source: the name of the data, for errors.

    Raises:
        DataError: ``data-audio``, with the row, counted from 1, and the file: it is missing, is not one that
            libsndfile reads, or has no samples; or both messages and a column name files, or neither.
        MissingDependencyError: there are such files, and nothing reads them.
    """
    rows = _from_messages(rows, source)
    for name in file_columns(rows):
        rows = _resolved(_undecoded(rows, name), name, home, source)
    return rows


def file_columns(rows: Dataset) -> tuple[str, ...]:
    """Return the audio columns that hold files, not arrays."""
    return tuple(name for name in _COLUMNS if name in rows.features and _is_file(rows.features[name]))


def _is_file(feature: Any) -> bool:
    from datasets import Audio, Json, Value

    if isinstance(feature, Mapping):
        return "array" not in feature and not {"path", "bytes"}.isdisjoint(feature)
    if isinstance(feature, Value):
        return "string" in feature.dtype or "binary" in feature.dtype
    return isinstance(feature, (Audio, Json)) or _is_file(getattr(feature, "feature", {}))


def _undecoded(rows: Dataset, name: str) -> Dataset:
    """Keep ``datasets`` from decoding a column, for which it needs torchcodec."""
    from datasets import Audio, List

    feature = rows.features[name]
    if isinstance(feature, Audio):
        return rows.cast_column(name, Audio(decode=False))
    if isinstance(getattr(feature, "feature", None), Audio):
        return rows.cast_column(name, List(Audio(decode=False)))
    return rows


def _resolved(rows: Dataset, name: str, home: Path, source: str) -> Dataset:
    """Return the rows with full paths in a column; one with bytes stays as it is."""
    from datasets import List, Value

    one = name == "audio"
    found = [
        [_full_path(cell, home, f"{source}, row {at}") for cell in ([cells] if one else cells or ())]
        for at, cells in enumerate(rows[name], 1)
    ]
    if any("" in paths for paths in found):
        return rows
    feature = Value("string") if one else List(Value("string"))
    column = [paths[0] for paths in found] if one else found
    return rows.remove_columns(name).add_column(name, column, feature=feature)


def _full_path(cell: Any, home: Path, where: str) -> str | None:
    """Return a full path, None for an empty cell, "" for bytes."""
    return None if cell is None else AudioFile.of(cell, where).check(home, where) or ""


def _from_messages(rows: Dataset, source: str) -> Dataset:
    """Add a column ``audios`` of the files that messages name."""
    from datasets import List, Value

    names = [name for name in CONVERSATIONS if name in rows.features and _may_have_parts(rows.features[name])]
    named = [_named_files(row) for row in rows.select_columns(names)] if names else []
    if not any(named):
        return rows
    if any(name in rows.features for name in _COLUMNS):
        _check_named_once(named, source)
        return rows
    bare = next((at for at, files in enumerate(named, 1) if None in files), None)
    if bare is not None:
        raise audio_error(
            "a message has audio without a file",
            f"{source}, row {bare}",
            "and the row has no audio column",
            '{"type": "audio", "path": FILE}; arrays go into a column audio or audios',
        )
    return rows.add_column("audios", named, feature=List(Value("string")))


def _check_named_once(named: Iterable[list[str | None]], source: str) -> None:
    twice = next((at for at, files in enumerate(named, 1) if any(files)), None)
    if twice is not None:
        why = "by messages and by a column"
        raise audio_error("audio files are named twice", f"{source}, row {twice}", why, "leave one of them out")


def _may_have_parts(feature: Any) -> bool:
    """Check whether a column's messages may have parts: not all of their content is plain text."""
    from datasets import Value

    message = getattr(feature, "feature", feature)
    content = message.get("content") if isinstance(message, Mapping) else message
    return not isinstance(content, Value)


def _named_files(row: Mapping[str, Any]) -> list[str | None]:
    """Return the file of each audio part in a row's messages, in order; None for one without."""
    messages = [message for value in row.values() if isinstance(value, list) for message in value]
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [_file(part) for part in parts if part.get("type") == "audio"]


def _file(part: Mapping[str, Any]) -> str | None:
    """Return the file of an audio part, under either key that transformers reads."""
    return next((name for key in ("audio", "path") if isinstance(name := part.get(key), str)), None)
