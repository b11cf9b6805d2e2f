"""Rows that are longer than TRL keeps, from the recipe to the report: what doctor says is what training does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.gemma import letters
from tests.training.small import docstrings, save_model, write_recipe

import graftkit as gk
from graftkit.errors import TrainingError
from graftkit.findings import Finding, Severity
from graftkit.recipes.recipe import Recipe, read_recipe

ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True}
PAIRS = [{"prompt": signature, "completion": f" {summary}"} for signature, summary in docstrings(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), letters())


def recipe_for(folder: Path, base: Path, rows: list[dict[str, Any]], **args: Any) -> Recipe:
    return read_recipe(write_recipe(folder / "run.json", base, rows, args={**ONE_STEP, **args}))


def truncation(report: gk.Report) -> list[Finding]:
    return [finding for finding in report if finding.code == "GK214"]


def test_doctor_training_and_the_report_agree(tmp_path: Path, base: Path) -> None:
    recipe = recipe_for(tmp_path, base, PAIRS, max_length=80)
    (told,) = truncation(gk.doctor(recipe=recipe))
    result = gk.train(recipe)
    before, during = truncation(result.findings)
    assert told.severity is before.severity is Severity.WARNING
    assert told.evidence == before.evidence
    assert told.evidence["rows"] == told.evidence["rows_in_data"] == len(PAIRS)
    assert 0 < told.evidence["cut"] < len(PAIRS)
    assert told.line is not None
    assert during.evidence["rows"] == 8
    page = result.report.read_text(encoding="utf-8")
    assert "histogram-1" in page
    assert f"{told.evidence['cut']} rows are cut" in page
    assert 'class="limit"' in page


def test_rows_without_anything_to_learn_stop_it_before_the_first_step(tmp_path: Path, base: Path) -> None:
    recipe = recipe_for(tmp_path, base, PAIRS, max_length=40)
    (told,) = truncation(gk.doctor(recipe=recipe))
    assert told.severity is Severity.ERROR
    assert told.evidence["nothing_left"] > 0.05 * len(PAIRS)
    with pytest.raises(TrainingError) as stopped:
        gk.train(recipe)
    assert stopped.value.code == "guard"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_no_row_left_is_said_so(tmp_path: Path, base: Path) -> None:
    with pytest.raises(TrainingError) as stopped:
        gk.train(recipe_for(tmp_path, base, PAIRS, max_length=4))
    assert stopped.value.code == "nothing-to-learn"


def test_doctor_downloads_no_data(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    recipe = recipe_for(tmp_path, base, PAIRS, max_length=80)
    (tmp_path / "run.jsonl").unlink()
    for offline, code in ((True, "data-missing"), (False, "data-not-local")):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", offline)
        (told,) = truncation(gk.doctor(recipe=recipe))
        assert (told.severity, told.evidence["code"]) == (Severity.UNKNOWN, code)


def test_doctor_reads_the_template_that_the_recipe_names(tmp_path: Path) -> None:
    """The model's own has no marks; with the recipe's, what the assistant says is learned."""
    base = save_model(tmp_path / "base", letters())
    marked = tmp_path / "marked.jinja"
    marked.write_text(
        "{% for m in messages %}<|turn>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<turn|>{% endgeneration %}{% else %}{{ m.content }}<turn|>{% endif %}\n{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": t}]}
        for s, t in docstrings(20)
    ]
    recipe = recipe_for(tmp_path, base, rows, assistant_only_loss=True, chat_template_path=str(marked))
    found = {finding.code: finding for finding in gk.doctor(recipe=recipe)}
    assert [found[code].severity for code in ("GK206", "GK207", "GK214")] == [Severity.OK] * 3
    assert found["GK214"].evidence["rows"] == 20
