"""The public table says what the facts say, and what was measured where it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftkit.engines import Fact, Feature, Remedy, Stance
from graftkit.report.serving_table import Answer, answer_of, html, main, markdown, sections

_MEASURED = """
[vllm.mixtral]
router = { stock = "ignored", converted = "applied" }
experts = { stock = "ignored", converted = "convert-unsupported" }
embeddings = { stock = "applied", converted = "convert-unsupported" }
["llama.cpp".llama]
attention = { stock = "refused", converted = "refused" }
"""


def _rows(title: str, measured: dict[str, object] | None = None) -> dict[tuple[str, str], dict[str, str]]:
    section = next(s for s in sections(measured or {}) if s.title == title)  # type: ignore[arg-type]
    names = [re.split(r" \d", column)[0] for column in section.columns]
    return {(row[0], row[1]): dict(zip(names, row, strict=True)) for row in section.rows}


@pytest.mark.parametrize(
    ("stance", "options", "answer"),
    [
        pytest.param(Stance.TAKES, {}, Answer.APPLIED, id="taken"),
        pytest.param(Stance.IGNORES, {"flag": "--yes"}, Answer.FLAG, id="behind an option"),
        pytest.param(Stance.IGNORES, {"remedy": Remedy.CONVERT}, Answer.CONVERT, id="converted"),
        pytest.param(Stance.REFUSES, {"remedy": Remedy.MERGE}, Answer.MERGE, id="merged"),
        pytest.param(Stance.REFUSES, {"help": "no"}, Answer.NO, id="nothing to be done"),
        pytest.param(Stance.UNKNOWN, {}, Answer.UNKNOWN, id="unknown is never applied"),
    ],
)
def test_what_follows_from_a_fact(stance: Stance, options: dict[str, object], answer: Answer) -> None:
    assert answer_of(Fact(Feature.DORA, stance, "does", "here", **options)) is answer  # type: ignore[arg-type]


def test_a_site_of_an_architecture() -> None:
    found = _rows("By architecture and site")
    assert found["mixtral", "experts"]["vLLM"] == Answer.CONVERT
    assert found["gpt_oss", "experts"]["vLLM"] == Answer.APPLIED
    assert found["gemma4-E2B", "towers"]["vLLM"] == Answer.FLAG
    assert found["gemma4-E2B", "per-layer embeddings"]["llama.cpp"] == Answer.MERGE
    assert {row["Ollama"] for row in found.values()} == {Answer.MERGE}
    assert {row["MLX"] for (_, site), row in found.items() if site != "towers"} == {Answer.CONVERT}


def test_what_was_measured_counts_before_the_facts() -> None:
    import tomllib

    found = _rows("By architecture and site", tomllib.loads(_MEASURED))
    assert found["mixtral", "router"]["vLLM"] == f"{Answer.CONVERT}*"
    assert found["mixtral", "experts"]["vLLM"] == f"{Answer.MERGE}*"
    assert found["mixtral", "embeddings"]["vLLM"] == f"{Answer.APPLIED}*"
    assert found["llama", "attention, MLP"]["llama.cpp"] == f"{Answer.MERGE}*"
    # Nobody ran Ollama.
    assert found["llama", "attention, MLP"]["Ollama"] == Answer.MERGE


def test_a_class_without_lora_and_one_whose_weights_are_passed_over() -> None:
    section = next(s for s in sections({}) if s.title == "By class")
    rows = {row[0]: row[1:] for row in section.rows}
    assert Answer.MERGE in rows["MambaForCausalLM"]
    assert "q_a_proj" in rows["DeepseekV3ForCausalLM"][-1]
    assert rows["LlamaForCausalLM"][-1] == ""


def test_every_row_has_every_column() -> None:
    for section in sections({}):
        assert section.rows
        assert {len(row) for row in section.rows} == {len(section.columns)}


def test_both_pages_have_the_same_rows_and_load_nothing() -> None:
    page, text = html({}), markdown({})
    rows = sum(len(section.rows) for section in sections({}))
    assert page.count("<tr>") == rows + len(sections({}))
    assert len(re.findall(r"^\| (?!architecture|option|class)", text, re.MULTILINE)) == rows
    assert not re.search(r"<script|<link|<img|src=", page)


def test_a_stale_page_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "expected.toml"
    measured.write_text(_MEASURED, encoding="utf-8")
    assert main([str(tmp_path), str(measured)]) == 0
    assert main([str(tmp_path), str(measured), "--check"]) == 0
    assert main([str(tmp_path), str(tmp_path / "missing.toml"), "--check"]) == 1
    assert "serving-table.md" in capsys.readouterr().err
