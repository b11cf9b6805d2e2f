"""Fixes are written to their file, once, and the checks run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftkit.checks.engine.fixing import fix_all
from graftkit.errors import OutputError
from graftkit.findings import Finding, Fix, Report, Severity
from graftkit.recipes.document import read_document


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: x\nargs:\n  packing: true  # faster\n  fp16: true\n")
    return file


def finding(code: str, fix: Fix) -> Finding:
    return Finding(code, Severity.ERROR, "t", "m", fix=fix)


def packing_must_be_off(file: Path) -> Report:
    on = read_document(file).plain()["args"].get("packing")
    return Report((finding("GK205", Fix("recipe", {"args.packing": False})),) if on else ())


def test_a_recipe_is_fixed_and_checked_again(recipe: Path) -> None:
    report, applied = fix_all(lambda: packing_must_be_off(recipe), recipe=recipe)
    assert len(report) == 0
    assert [f.code for f in applied] == ["GK205"]
    assert recipe.read_text() == "model: x\nargs:\n  packing: false # faster\n  fp16: true\n"


def test_keys_are_removed(recipe: Path) -> None:
    def check() -> Report:
        present = "fp16" in read_document(recipe).plain()["args"]
        return Report((finding("GK209", Fix("recipe", removes=("args.fp16",))),) if present else ())

    fix_all(check, recipe=recipe)
    assert "fp16" not in recipe.read_text()


def test_of_two_fixes_for_one_key_the_first_is_written(recipe: Path) -> None:
    one, other = (finding(code, Fix("recipe", {"args.packing": code})) for code in ("GK1", "GK2"))
    _, applied = fix_all(lambda: Report((one, other)), recipe=recipe)
    assert applied[0] is one
    assert len(applied) == 2, "the other is still needed in the next round"


def test_a_second_fix_for_a_key_is_not_written_where_the_first_has_helped(recipe: Path) -> None:
    both = tuple(
        finding(code, Fix("recipe", {"args.packing": value})) for code, value in (("GK1", False), ("GK2", 0))
    )

    def check() -> Report:
        return Report(both if read_document(recipe).plain()["args"]["packing"] is True else ())

    report, applied = fix_all(check, recipe=recipe)
    assert (len(report), [f.code for f in applied]) == (0, ["GK1"])
    assert read_document(recipe).plain()["args"]["packing"] is False


def test_a_fix_that_does_not_help_ends(recipe: Path) -> None:
    standing = finding("GK1", Fix("recipe", {"args.packing": False}))
    report, applied = fix_all(lambda: Report((standing,)), recipe=recipe)
    assert (len(report), len(applied)) == (1, 1)


def test_a_fix_for_a_file_that_was_not_given_is_not_written(recipe: Path) -> None:
    standing = finding("GK507", Fix("adapter", {"target_modules": ["a"]}))
    report, applied = fix_all(lambda: Report((standing,)), recipe=recipe)
    assert (len(report), len(applied)) == (1, 0)


def test_an_adapters_configuration_is_fixed(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["a"], "old": 1}))
    standing = finding("GK507", Fix("adapter", {"target_modules": ["a.linear"]}, ("old",)))
    fix_all(lambda: Report((standing,)), adapter=tmp_path)
    assert json.loads(config.read_text()) == {"peft_type": "LORA", "target_modules": ["a.linear"]}


def test_a_file_that_cannot_be_written_is_unchanged(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError):
        fix_all(lambda: packing_must_be_off(recipe), recipe=recipe)
    assert recipe.read_text() == before
