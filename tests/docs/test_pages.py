"""Every Python and shell block of the README and the documentation runs as it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tests.docs.pages import ROOT, Page, all_pages
from tests.docs.picture import HEIGHT, SCALE, WIDTH
from tests.docs.server import Programs
from tests.docs.stand_ins import Models
from tests.docs.steps import LANGUAGES, missing, steps_of

# What leads to the pages.
ENTRANCES = {"README.md", "docs/index.md"}
PAGES = {page.path: page for page in all_pages()}
RUN = [path for path, page in PAGES.items() if any(block.language in ("python", "sh") for block in page.blocks)]


@pytest.mark.parametrize("path", RUN)
def test_every_block_runs(path: str, tmp_path: Path, run_in: Programs, models: Models) -> None:
    page, folder = PAGES[path], tmp_path / "page"
    folder.mkdir()
    models.put(page.stand_ins, run_in.hub, folder)
    steps = steps_of(page, folder)
    (tmp_path / "steps.json").write_text(json.dumps([step.to_list() for step in steps]))
    done = run_in.run(["page", str(tmp_path / "steps.json")], folder)
    printed = [(step, step.output.read_text() if step.output.exists() else None) for step in steps]
    for step, text in printed:
        assert text is not None, f"not reached: line {step.block.line}\n{done.stdout}"
        last = done.returncode != 0 and (step is steps[-1] or not steps[steps.index(step) + 1].output.exists())
        assert not last, f"{path}:{step.block.line}\n{text[-6000:]}\n{done.stdout[-2000:]}"
        assert missing(step.shows, text) == [], f"{path}:{step.block.line}\n{text[-6000:]}"
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_says_what_its_tests_run(page: Page) -> None:
    languages = {block.language for block in page.blocks}
    assert page.says_what_runs == bool(languages & {"python", "sh"})
    assert page.says_what_does_not or not page.has_what_is_not_run


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_block_has_a_language_that_is_known(page: Page) -> None:
    """So that none is passed over: a fence without a language, or with another name for shell, would be."""
    assert {block.language for block in page.blocks} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_begins_with_what_its_reader_will_have(page: Page) -> None:
    title, _, first, *_ = page.text.splitlines()
    assert title.startswith("# ")
    assert first.startswith("**") if page.path in ENTRANCES else first.startswith("**At the end** ")


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/serving.md", "docs/architecture.md"} <= PAGES.keys()
    assert RUN


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_to_files(page: Page) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.text)
    assert [link for link in links if not (ROOT / page.path).parent.joinpath(link).exists()] == []


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(PAGES["README.md"].text.splitlines()) <= 95


def test_the_picture_is_one() -> None:
    with Image.open(ROOT / "docs/images/demo.png") as picture:
        assert picture.size == (WIDTH * SCALE, HEIGHT * SCALE)
        assert len(picture.convert("L").getcolors() or range(256)) > 50
