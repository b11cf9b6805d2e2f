"""The columns of a dataset whose rows name sounds by file: found and opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.training.data.audio_file import SoundFile, refused
from graftkit.training.data.message_parts import CONVERSATIONS

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("audio", "audios")


def sounds_found(rows: Dataset, home: Path, told: str) -> Dataset:
    """The rows with every sound's file by its full path, each opened once and its header read.

    ``audio`` holds a row's sound and ``audios`` several: a path, an ``Audio`` of ``datasets``, or a mapping with
    ``path`` or ``bytes``. Sounds that messages name, as ``{"type": "audio", "path": FILE}`` or with ``audio`` for
    ``path``, become ``audios``. Arrays stay as they are.

    Args:
        rows: with their columns under the trainer's names.
        home: what paths are relative to.
        told: the data, as errors call it.

    Raises:
        DataError: ``data-audio``, with the row, counted from 1, and the file: it is not there, is none that
            libsndfile reads, or holds no sample; or messages and a column name sounds, or neither does.
        MissingDependencyError: there are such sounds, and nothing reads them.
    """
    rows = _from_messages(rows, told)
    for name in columns_of_files(rows):
        rows = _resolved(_undecoded(rows, name), name, home, told)
    return rows


def columns_of_files(rows: Dataset) -> tuple[str, ...]:
    """The columns of sounds that are files, and not arrays."""
    return tuple(name for name in _COLUMNS if name in rows.features and _is_file(rows.features[name]))


def _is_file(feature: Any) -> bool:
    from datasets import Audio, Json, Value

    if isinstance(feature, Mapping):
        return "array" not in feature and not {"path", "bytes"}.isdisjoint(feature)
    if isinstance(feature, Value):
        return "string" in feature.dtype or "binary" in feature.dtype
    return isinstance(feature, (Audio, Json)) or _is_file(getattr(feature, "feature", {}))


def _undecoded(rows: Dataset, name: str) -> Dataset:
    """With files instead of what ``datasets`` decodes them to, for which it needs torchcodec."""
    from datasets import Audio, List

    feature = rows.features[name]
    if isinstance(feature, Audio):
        return rows.cast_column(name, Audio(decode=False))
    if isinstance(getattr(feature, "feature", None), Audio):
        return rows.cast_column(name, List(Audio(decode=False)))
    return rows


def _resolved(rows: Dataset, name: str, home: Path, told: str) -> Dataset:
    """With full paths; a column with bytes stays as it is."""
    from datasets import List, Value

    one = name == "audio"
    found = [
        [_opened(sound, home, f"{told}, row {at}") for sound in ([given] if one else given or ())]
        for at, given in enumerate(rows[name], 1)
    ]
    if any("" in paths for paths in found):
        return rows
    feature = Value("string") if one else List(Value("string"))
    column = [paths[0] for paths in found] if one else found
    return rows.remove_columns(name).add_column(name, column, feature=feature)


def _opened(sound: Any, home: Path, where: str) -> str | None:
    """A full path; None for no sound, empty for one that comes as bytes."""
    return None if sound is None else SoundFile.of(sound, where).opened(home, where) or ""


def _from_messages(rows: Dataset, told: str) -> Dataset:
    """With the files that messages name as a column ``audios``."""
    from datasets import List, Value

    names = [name for name in CONVERSATIONS if name in rows.features and _in_parts(rows.features[name])]
    named = [_named(row) for row in rows.select_columns(names)] if names else []
    if not any(named):
        return rows
    if any(name in rows.features for name in _COLUMNS):
        _refuse_both(named, told)
        return rows
    bare = next((at for at, files in enumerate(named, 1) if None in files), None)
    if bare is not None:
        raise refused(
            "a message has a sound without a file",
            f"{told}, row {bare}",
            "no column holds sounds in its place",
            '{"type": "audio", "path": FILE}; arrays go into a column audio or audios',
        )
    return rows.add_column("audios", named, feature=List(Value("string")))


def _refuse_both(named: Iterable[list[str | None]], told: str) -> None:
    twice = next((at for at, files in enumerate(named, 1) if any(files)), None)
    if twice is not None:
        why = "by messages and by a column"
        raise refused("sounds are named twice", f"{told}, row {twice}", why, "leave one of them out")


def _in_parts(feature: Any) -> bool:
    """Whether a column's messages may have parts: their content is not plain text throughout."""
    from datasets import Value

    message = getattr(feature, "feature", feature)
    content = message.get("content") if isinstance(message, Mapping) else message
    return not isinstance(content, Value)


def _named(row: Mapping[str, Any]) -> list[str | None]:
    """The file of each sound in a row's messages, in order; None for one without."""
    messages = [message for told in row.values() if isinstance(told, list) for message in told]
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [_file(part) for part in parts if part.get("type") == "audio"]


def _file(part: Mapping[str, Any]) -> str | None:
    """What a message's sound names, under either name that transformers reads."""
    return next((name for key in ("audio", "path") if isinstance(name := part.get(key), str)), None)
