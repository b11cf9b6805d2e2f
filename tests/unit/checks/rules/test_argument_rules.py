"""GK212: arguments that TRL does not have are found before training, with their place in the recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.checks.observed import seen

import graftkit as gk
from graftkit.checks.doctor import doctor
from graftkit.checks.rehearse import rehearse
from graftkit.errors import RecipeError
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.trainer_arguments import trainer_arguments

pytest.importorskip("trl")

ERROR, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.OK, gk.Severity.UNKNOWN
ALONE = CheckSettings(select=("GK212",))


def recipe(folder: Path, args: str, trainer: str = "sft") -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(f"model: llama\nadapter: {{targets: attention}}\ntrainer: {trainer}\n{args}\n")
    return read_recipe(file)


@pytest.mark.rule_fails("GK212")
@pytest.mark.parametrize(
    ("args", "place", "name"),
    [
        pytest.param("args:\n  seed: 1\n  learning_rat: 1", (6, 3), "learning_rate", id="a slip"),
        pytest.param("args: {num_epochs: 1}", (4, 8), "num_train_epochs", id="on one line"),
        pytest.param("args:\n  zzz: 1", (5, 3), "help(trl.SFTConfig)", id="nothing near"),
        pytest.param("args:\n  num_generations: 8", (5, 3), "SFTConfig", id="another trainer's"),
        pytest.param("args:\n  learning.rate: 8", (5, 3), "learning_rate", id="with a dot"),
    ],
)
def test_gk212_an_argument_that_trl_does_not_have(
    tmp_path: Path, args: str, place: tuple[int, int], name: str
) -> None:
    written = recipe(tmp_path, args)
    found = seen("GK212", recipe=written)
    assert found.severity is ERROR
    assert f"(line {place[0]}, column {place[1]})" in found.message
    assert name in f"{found.message} {found.help}"
    assert found.file == str(written.path)
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(written)
    assert caught.value.where == f"{written.path}:{place[0]}:{place[1]}"
    assert caught.value.help == found.help


@pytest.mark.rule_fails("GK212")
def test_gk212_names_all_of_them_and_the_line_of_the_first(tmp_path: Path) -> None:
    found = seen("GK212", recipe=recipe(tmp_path, "args:\n  learning_rat: 1\n  seed: 1\n  packin: true"))
    assert "'learning_rat' (line 5, column 3), 'packin' (line 7, column 3)" in found.message
    assert found.line == 5
    assert "learning_rate" in str(found.help)
    assert "packing" in str(found.help)


@pytest.mark.rule_passes("GK212")
@pytest.mark.parametrize(
    ("args", "trainer"),
    [
        pytest.param("", "sft", id="no arguments"),
        pytest.param("args: {learning_rate: 1.0e-4, packing: true, model_init_kwargs: {}}", "sft", id="sft"),
        pytest.param("args: {beta: 0.1}", "dpo", id="dpo"),
        pytest.param("args: {num_generations: 8}", "grpo", id="grpo"),
    ],
)
def test_gk212_passes_on_what_trl_has(tmp_path: Path, args: str, trainer: str) -> None:
    assert seen("GK212", recipe=recipe(tmp_path, args, trainer)).severity is OK


def test_gk212_is_unknown_without_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    found = seen("GK212", recipe=recipe(tmp_path, "args: {learning_rat: 1}"))
    assert found.severity is UNKNOWN
    assert "trl" in found.message
    assert "pip install" in str(found.help)


def by_doctor(written: Recipe) -> Any:
    return doctor(recipe=written, settings=ALONE)


def by_rehearsal(written: Recipe) -> Any:
    return rehearse(written, settings=ALONE)


@pytest.mark.parametrize("check", [by_doctor, by_rehearsal])
def test_gk212_before_training(tmp_path: Path, check: Any) -> None:
    (found,) = check(recipe(tmp_path, "args:\n  learning_rat: 1"))
    assert (found.severity, found.line, found.where) == (ERROR, 5, "args.learning_rat")
    (right,) = check(recipe(tmp_path, "args:\n  learning_rate: 1"))
    assert right.severity is OK


def test_the_trainers_are_not_imported_for_it(tmp_path: Path) -> None:
    written = recipe(tmp_path, "args: {learning_rat: 1}")
    code = (
        "import sys; from graftkit.recipes.arguments import unknown_arguments;"
        "from graftkit.recipes.recipe import read_recipe;"
        f"recipe = read_recipe({str(written.path)!r});"
        "assert unknown_arguments(recipe.document, recipe.fields.trainer, recipe.args);"
        "sys.exit(any(f'trl.trainer.{name}_trainer' in sys.modules for name in ('sft', 'dpo', 'grpo')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
