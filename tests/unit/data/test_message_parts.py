"""Texts in columns of mixed contents stay the texts that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftkit.data.message_parts import keep_json_texts

datasets = pytest.importorskip("datasets")

PARTS = [{"type": "image"}, {"type": "text", "text": "6"}]


def read(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")


def conversation(answer: Any, content: Any = PARTS) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], "n": 1}


def answered(result: Any, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "tool", "content": result}, {"role": "assistant", "content": answer}]}


def text_of(content: Any) -> Any:
    """Return the text of a content, a string or a list of parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.mark.parametrize("answer", ["6", "1e5", "true", "null", '{"a": 1}', "[1]", "words", "2 words"])
def test_a_text_that_is_json_comes_back_as_it_was_written(tmp_path: Path, answer: str) -> None:
    rows = keep_json_texts(read(tmp_path, [conversation(answer), conversation("plain")]))
    assert text_of(rows[0]["messages"][1]["content"]) == answer
    assert rows[0]["messages"][0]["content"] == PARTS
    assert rows[1]["messages"][1]["content"] == "plain"
    assert [row["n"] for row in rows] == [1, 1]


@pytest.mark.parametrize("answer", ["6", "true", "null", '{"a": 1}', "[1]", "words"])
def test_so_does_one_beside_what_a_tool_answers(tmp_path: Path, answer: str) -> None:
    """No message has parts; the tool's mapping alone makes the column one of JSON."""
    rows = keep_json_texts(read(tmp_path, [answered({"degrees": 6}, answer), answered("true", "plain")]))
    assert text_of(rows[0]["messages"][1]["content"]) == answer
    assert rows[0]["messages"][0]["content"] == {"degrees": 6}
    assert text_of(rows[1]["messages"][0]["content"]) == "true"


def test_datasets_alone_reads_a_number(tmp_path: Path) -> None:
    """The installed version of ``datasets`` still has the cause; without it the module is not needed."""
    assert read(tmp_path, [conversation("6")])[0]["messages"][1]["content"] == 6


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(conversation("6", "which?"), id="plain texts"),
        pytest.param(conversation([{"type": "text", "text": "6"}]), id="parts alone"),
        pytest.param(conversation("words"), id="nothing that is JSON"),
        pytest.param(answered({"degrees": 6}, "warm"), id="a tool's answer"),
        pytest.param(answered([{"degrees": 6}, 7], "warm"), id="a tool's list"),
        pytest.param({"text": "6"}, id="no messages"),
    ],
)
def test_other_rows_stay_as_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = read(tmp_path, [row])
    assert keep_json_texts(rows) is rows
