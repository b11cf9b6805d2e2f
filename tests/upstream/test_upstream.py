"""Faults of others that docs/upstream reports are still there, and every page has its script and its line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "upstream"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "README.md")
# What a script may import for us to run it.
OURS = {"torch", "transformers", "peft", "safetensors", *sys.stdlib_module_names}


def imports_of(script: Path) -> set[str]:
    return set(re.findall(r"^(?:import|from) (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE))


def runs_here(script: Path) -> bool:
    """Check whether a script needs what the tests have: no engine, and no checkout as its argument."""
    return imports_of(script) <= OURS and "sys.argv" not in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", [*filter(runs_here, SCRIPTS)], ids=lambda path: path.stem)
def test_the_fault_is_still_there(script: Path) -> None:
    """A fault that is gone: take away its page, its script and what graftkit says of it."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1, done.stdout


def test_some_scripts_run_here() -> None:
    assert len([script for script in SCRIPTS if runs_here(script)]) >= 2


def test_no_script_needs_graftkit() -> None:
    assert [script.name for script in SCRIPTS if "graftkit" in imports_of(script)] == []


def test_every_page_has_its_script() -> None:
    assert [page.stem for page in PAGES] == [script.stem for script in SCRIPTS]


def test_the_list_has_every_page_under_its_title() -> None:
    listed = re.findall(r"^\| \[(.+?)\]\((\w+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    titles = {page.stem: page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in PAGES}
    assert {stem: title for title, stem in listed} == titles


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_says_what_a_report_needs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fields = dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", text, re.MULTILINE))
    assert fields.keys() >= {"where", "seen with", "script", "threads"}
    assert {"Expected", "Actual", "What graftkit does"} <= set(re.findall(r"^## (.+)$", text, re.MULTILINE))
