"""Rows that name audio files, in a column or in messages, in every format of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.data.test_audio_file import RATE, tone

from graftkit.data.audio_columns import file_columns, resolve_audio_files
from graftkit.errors import DataError
from graftkit.training.trainers.audio_collator import read_audio_at

datasets = pytest.importorskip("datasets")
soundfile = pytest.importorskip("soundfile")

TEXT = {"type": "text", "text": "Which?"}
ANSWER = {"role": "assistant", "content": "This."}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with a.wav, b.flac and c.ogg, of different lengths and rates."""
    for at, name in enumerate(("a.wav", "b.flac", "c.ogg"), 1):
        soundfile.write(tmp_path / name, tone(440, at / 10, 8_000 * at), 8_000 * at)
    return tmp_path


def rows_of(home: Path, rows: list[dict[str, Any]]) -> Any:
    """Return the rows of a file of JSON lines, each with a text besides its audio."""
    (home / "rows.jsonl").write_text("".join(f"{json.dumps({'text': 'it', **row})}\n" for row in rows))
    return datasets.load_dataset("json", data_files=str(home / "rows.jsonl"), split="train")


def found(home: Path, rows: list[dict[str, Any]]) -> Any:
    return resolve_audio_files(rows_of(home, rows), home, "rows.jsonl")


def refused(home: Path, rows: list[dict[str, Any]]) -> DataError:
    with pytest.raises(DataError) as caught:
        found(home, rows)
    assert caught.value.code == "data-audio"
    return caught.value


def lengths(rows: Any) -> list[Any]:
    """Return the length of each row's audio, in tenths of a second."""

    def length(samples: Any) -> float:
        return float(round(len(samples) / RATE * 10, 2))

    read = read_audio_at(rows, RATE)
    if "audio" in rows.column_names:
        return [None if row["audio"] is None else length(row["audio"]) for row in read]
    return [[length(samples) for samples in row["audios"]] for row in read]


def spoken(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([{"audio": "a.wav"}, {"audio": "c.ogg"}], [1, 3], id="paths"),
        pytest.param([{"audio": "a.wav"}, {"audio": None}], [1, None], id="a row without"),
        pytest.param([{"audio": {"path": "b.flac"}}], [2], id="mappings with a path"),
        pytest.param([{"audio": {"path": "b.flac", "bytes": None}}], [2], id="mappings without their bytes"),
        pytest.param([{"audios": ["a.wav", "b.flac"]}, {"audios": []}], [[1, 2], []], id="several"),
        pytest.param([{"audios": [{"path": "a.wav"}]}, {"audios": None}], [[1], []], id="several mappings"),
    ],
)
def test_columns_of_files_are_read(home: Path, rows: list[dict[str, Any]], expected: list[Any]) -> None:
    assert lengths(found(home, rows)) == expected


@pytest.mark.parametrize("several", [False, True])
def test_files_kept_by_datasets_need_no_torchcodec(home: Path, several: bool) -> None:
    """As an audio column is written to Parquet: each file whole, within the row."""
    content = (home / "b.flac").read_bytes()
    kept: Any = {"bytes": content, "path": "b.flac"}
    name, value = ("audios", [kept]) if several else ("audio", kept)
    feature = datasets.List(datasets.Audio()) if several else datasets.Audio()
    datasets.Dataset.from_list([{name: value}]).cast_column(name, feature).to_parquet(home / "rows.parquet")
    read = datasets.load_dataset("parquet", data_files=str(home / "rows.parquet"), split="train")
    assert read.features[name] == feature
    rows = resolve_audio_files(read, home / "elsewhere", "rows.parquet")
    assert lengths(rows) == ([[2]] if several else [2])


def test_columns_of_bytes_are_read(home: Path) -> None:
    rows = datasets.Dataset.from_list([{"audio": (home / "a.wav").read_bytes()}])
    assert lengths(resolve_audio_files(rows, home, "rows.parquet")) == [1]


@pytest.mark.parametrize("key", ["path", "audio"])
def test_sounds_that_messages_name_become_a_column(home: Path, key: str) -> None:
    first, second = {"type": "audio", key: "a.wav"}, {"type": "audio", key: "b.flac"}
    rows = found(home, [spoken(first, TEXT, second), spoken(TEXT)])
    assert lengths(rows) == [[1, 2], []]
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["audio", "text", "audio"]


def test_sounds_are_named_by_prompts_too(home: Path) -> None:
    question = {"role": "user", "content": [{"type": "audio", "path": "c.ogg"}, TEXT]}
    assert lengths(found(home, [{"prompt": [question], "completion": [ANSWER]}])) == [[3]]


def test_plain_and_parted_messages_side_by_side(home: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "Which?"}, ANSWER]}
    assert lengths(found(home, [plain, spoken({"type": "audio", "path": "a.wav"})])) == [[], [1]]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"text": "words"}, id="text"),
        pytest.param({"messages": [{"role": "user", "content": "Which?"}, ANSWER]}, id="messages"),
        pytest.param(spoken(TEXT), id="messages in parts"),
        pytest.param({"audio": [0.0, 0.5]}, id="an array"),
        pytest.param({"audios": [[0.0], [0.5]]}, id="arrays"),
        pytest.param({"audio": {"array": [0.5], "sampling_rate": RATE}}, id="an array with its rate"),
        pytest.param({"audio": [0.5], **spoken({"type": "audio"}, TEXT)}, id="an array for a place"),
    ],
)
def test_rows_without_files_stay_as_they_are(home: Path, row: dict[str, Any]) -> None:
    given = rows_of(home, [row])
    rows = resolve_audio_files(given, home, "rows.jsonl")
    assert file_columns(rows) == ()
    assert read_audio_at(rows, RATE) is rows
    assert rows.to_list() == given.to_list()


@pytest.mark.parametrize(
    ("rows", "file"),
    [
        pytest.param([{"audio": "a.wav"}, {"audio": "absent.wav"}], "absent.wav", id="not there"),
        pytest.param([{"audio": "a.wav"}, {"audio": "text.wav"}], "text.wav", id="no audio"),
        pytest.param([{"audios": ["a.wav"]}, {"audios": ["b.flac", "absent.wav"]}], "absent.wav", id="the second"),
        pytest.param(
            [spoken({"type": "audio", "path": "a.wav"}), spoken({"type": "audio", "path": "absent.wav"})],
            "absent.wav",
            id="in messages",
        ),
        pytest.param(
            [spoken({"type": "audio", "path": "a.wav"}), spoken({"type": "audio"})],
            "",
            id="a message without a file",
        ),
        pytest.param(
            [spoken({"type": "audio", "path": "a.wav"}), spoken({"type": "audio", "url": "https://x/a.wav"})],
            "",
            id="an address",
        ),
        pytest.param(
            [
                {"audio": "a.wav", **spoken({"type": "audio"})},
                {"audio": "a.wav", **spoken({"type": "audio", "path": "b.flac"})},
            ],
            "",
            id="named twice",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_row(home: Path, rows: list[dict[str, Any]], file: str) -> None:
    (home / "text.wav").write_text("no sound")
    error = refused(home, rows)
    assert error.where == "rows.jsonl, row 2"
    assert file in str(error.why)


def test_a_file_is_read_when_its_row_is_asked_for_and_not_before(home: Path) -> None:
    rows = read_audio_at(found(home, [{"audio": "a.wav"}, {"audio": "b.flac"}]), RATE)
    (home / "b.flac").write_bytes(b"no sound any more")
    assert rows[0]["audio"].dtype == np.float32
    with pytest.raises(DataError) as caught:
        rows[1]
    assert caught.value.code == "data-audio"
    assert "b.flac" in str(caught.value.where)
