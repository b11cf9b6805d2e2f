"""``graft doctor`` and ``graft verify --recipe``: forms, exit statuses, settings and fixes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import fields_of, forked, graft, refused

RECIPE = """\
model: google/gemma-4-E2B-it   # the small one
adapter:
  targets: attention
  scope: language
  r: 4
data: {modalities: [text]}
args:
  gradient_checkpointing_kwargs: {use_reentrant: true}
"""


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {found["code"]: found for found in fields_of(done)["findings"]}


def test_without_arguments_and_without_a_recipe(tmp_path: Path) -> None:
    done = forked("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GK002" not in done.stdout
    listed = forked("doctor", "-v", cwd=tmp_path)
    assert "ok GK002" in listed.stdout
    assert "GK100" in listed.stdout
    assert "GK100" not in done.stdout
    assert len(done.stdout.splitlines()) < 8


def test_the_recipe_of_the_current_folder_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = graft("doctor", "--json", cwd=tmp_path)
    assert findings(done)["GK100"]["severity"] == "ok"


def test_a_wrong_recipe_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("scope:", "scopes:"))
    error = refused("doctor", cwd=tmp_path)
    assert error["code"] == "recipe-invalid"
    assert error["where"].endswith("recipe.yaml:4:3")
    assert "scope" in error["help"]


def test_selected_rules_alone(tmp_path: Path) -> None:
    done = forked("doctor", "gemma4", "--select", "GK1,GK002", "--ignore", "GK103", "--json", cwd=tmp_path)
    codes = findings(done).keys()
    assert "GK002" in codes
    assert "GK101" in codes
    assert not {"GK103", "GK001"} & codes
    assert refused("doctor", "--select", "GK9", cwd=tmp_path)["code"] == "settings"


def test_settings_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.graftkit]\nselect = ["GK0"]\n')
    assert {code[:3] for code in findings(forked("doctor", "--json", cwd=tmp_path))} == {"GK0"}


@pytest.mark.parametrize(
    ("form", "sign"),
    [
        pytest.param("sarif", '"version": "2.1.0"', id="sarif"),
        pytest.param("html", "<!doctype html>", id="html"),
        pytest.param("github", "::", id="github"),
    ],
)
def test_forms(tmp_path: Path, form: str, sign: str) -> None:
    done = forked("doctor", "--format", form, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sign in done.stdout.lower()


def test_verify_a_recipe_on_the_twin_then_fix_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE)
    wrong = forked("verify", "--recipe", "run.yaml", "--twin", "--format", "github", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "::error file=run.yaml,line=8,title=GK202" in wrong.stdout
    fixed = forked("verify", "--recipe", "run.yaml", "--twin", "--fix", "--json", cwd=tmp_path)
    assert fixed.returncode == 0, fixed.stdout
    assert re.search(r"GK202.*run\.yaml", fixed.stderr)
    assert file.read_text() == RECIPE.replace("use_reentrant: true", "use_reentrant: false")


def test_the_figures_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Neither the order of sets nor the number of threads shows in a figure; the adapter is random, and seeded."""
    (tmp_path / "run.yaml").write_text(RECIPE)
    command = ("verify", "--recipe", "run.yaml", "--twin", "--json", "--ignore", "GK103,GK115")
    first, second = (
        findings(graft(*command, cwd=tmp_path, PYTHONHASHSEED=seed, OMP_NUM_THREADS=seed)) for seed in ("1", "2")
    )
    assert {"GK201", "GK202", "GK203", "GK205", "GK210", "GK508", "GK601", "GK607"} <= first.keys()
    assert first["GK210"]["evidence"]["gradient_difference"] > 1
    assert first == second


def test_so_are_those_of_a_twin_without_a_recipe(tmp_path: Path) -> None:
    command = ("verify", "llama", "--twin", "--json", "-r", "4")
    first, second = (graft(*command, cwd=tmp_path, PYTHONHASHSEED=seed, OMP_NUM_THREADS=seed) for seed in "12")
    assert findings(first) == findings(second)


def test_the_recipe_of_the_page_on_training_has_the_fault_that_it_shows(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    recipe = next(
        block for block in re.findall(r"```yaml[^\n]*\n(.*?)```", page, re.DOTALL) if "use_reentrant" in block
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ("verify", "--recipe", "recipe.yaml", "--twin", "--select", "GK202", "--json")
    found = findings(forked(*command, cwd=tmp_path))["GK202"]
    assert found["severity"] == "error"
    figures = found["evidence"]["re-entrant"]
    assert f"{figures['wrong']} of {figures['tensors']} adapter tensors" in page
    (tmp_path / "recipe.yaml").write_text(recipe.replace("E4B", "31B"))
    assert findings(forked(*command, cwd=tmp_path))["GK202"]["severity"] == "ok"


def test_a_recipe_and_other_words_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RECIPE)
    assert refused("verify", "--recipe", "run.yaml", "--twin", "--rank", "8", cwd=tmp_path)["code"] == "usage"
