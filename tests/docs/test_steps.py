"""What runs a page notices what is wrong with it: exit statuses, output, stand-ins, blocks in tabs."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
from tests.docs.pages import Block, Page, StandIn
from tests.docs.server import Programs
from tests.docs.steps import missing, shell, steps_of


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        pytest.param("true\n", True, id="0"),
        pytest.param("false\n", False, id="1"),
        pytest.param("false   # exit status 1: as it should\n", True, id="1 as said"),
        pytest.param("true    # exit status 1\n", False, id="0 against what is said"),
        pytest.param("false\ntrue\n", False, id="not only the last command"),
        pytest.param("# a remark\n\nx=1\ntest \\\n  $x = 1\n", True, id="lines that go on, and a variable"),
    ],
)
def test_each_command_ends_as_it_says(body: str, passes: bool) -> None:
    done = subprocess.run(["bash", "-c", shell(body)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == passes, done.stdout


def test_what_is_shown_was_printed() -> None:
    printed = "error GK202 gradients\n  where: recipe.yaml:8 model.layers.0\n"
    shown = Block("text", None, "where: recipe.yaml:8 …\n… GK202  gradients\nGK203\n", 1)
    assert missing([shown], printed) == ["GK203"]


def test_a_page_says_what_stands_in() -> None:
    text = """
    > Tests run every block of this page as it is, with a twin of `qwen3` as `Qwen/Qwen3-0.6B`, rows of
    > prompts as `train.jsonl`, an adapter for `Qwen/Qwen3-0.6B` as `a`. Not run: the server.
    """
    page = Page("page.md", textwrap.dedent(text))
    assert page.says_what_runs
    assert page.says_what_does_not
    assert page.stand_ins == (
        StandIn("a twin of `qwen3`", "Qwen/Qwen3-0.6B"),
        StandIn("rows of prompts", "train.jsonl"),
        StandIn("an adapter for `Qwen/Qwen3-0.6B`", "a"),
    )


def test_a_sentence_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(AssertionError, match="not an item"):
        _ = Page("page.md", "Tests run it as it is, with some luck.").stand_ins


def test_blocks_are_found_with_their_lines_and_files(tmp_path: Path) -> None:
    text = '# A\n\n=== "tab"\n    ```yaml title="a.yaml"\n    b: 1\n    ```\n\n'
    text += "```sh\ncat a.yaml\n```\n```text\nb: 1\n```\n"
    folder = tmp_path / "page"
    folder.mkdir()
    (step,) = steps_of(Page("page.md", text), folder)
    assert (folder / "a.yaml").read_text() == "b: 1\n"
    assert step.block.line == 9
    assert [block.body for block in step.shows] == ["b: 1\n"]


@pytest.mark.parametrize("wanted", ["graftkit[none]", "torch"], ids=["extra", "name"])
def test_pip_installs_this_project_with_its_extras_alone(wanted: str, run_in: Programs, tmp_path: Path) -> None:
    assert run_in.run(["pip", "install", "graftkit[train]"], tmp_path).returncode == 0
    assert run_in.run(["pip", "install", wanted], tmp_path).returncode == 1
