"""Rewards: the built-in ones give what they promise, and others are found beside the recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from graftkit.data.rewards import exact_match, load_rewards, number_match
from graftkit.errors import DataError


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 12 \n", 12, 1.0),
        ("12.", "12", 0.0),
        ("", "", 1.0),
        ([{"role": "assistant", "content": "yes"}], "yes", 1.0),
        ([{"role": "assistant", "content": None}], "yes", 0.0),
    ],
)
def test_exact_match(completion: Any, answer: Any, reward: float) -> None:
    assert exact_match([completion], answer=[answer], prompts=["?"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("3 + 4 = 7", "7", 1.0),
        ("7, no: 8", 7, 0.0),
        ("-0.50", "-.5", 1.0),
        ("1,234", "1234", 1.0),
        ("so 3, 4", 4, 1.0),
        ("12", 2, 0.0),
        ("The answer is 5.", 5, 1.0),
        ("5-3", 3, 1.0),
        ("none", 0, 0.0),
        ("7", "seven", 0.0),
        ([{"role": "assistant", "content": "it is 2"}], 2, 1.0),
    ],
)
def test_number_match(completion: Any, answer: Any, reward: float) -> None:
    assert number_match([completion], answer=[answer]) == [reward]


def test_rewards_are_as_many_as_completions() -> None:
    assert exact_match(["a", "b", "c"], answer=["a", "x", "c"]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a", "b"], answer=["a"])


def test_built_in_rewards_by_name(tmp_path: Path) -> None:
    assert load_rewards("exact_match", tmp_path) == [exact_match]
    assert load_rewards(["number_match", "exact_match"], tmp_path) == [number_match, exact_match]


def test_rewards_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "my_rewards_a.py").write_text(
        "def short(completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    before = list(sys.path)
    found = load_rewards("my_rewards_a:short", tmp_path)
    assert found[0](["x"]) == [1.0]
    assert found[0].__name__ == "short"
    assert sys.path == before


@pytest.mark.parametrize(
    ("names", "named"),
    [
        pytest.param(None, "exact_match", id="none"),
        pytest.param([], "exact_match", id="empty"),
        pytest.param("exact_mach", "exact_match", id="misspelt"),
        pytest.param("zzz", "number_match", id="unknown"),
        pytest.param("no_such_module:f", "no_such_module", id="no module"),
        pytest.param("my_rewards_b:long", "long", id="no function"),
        pytest.param("my_rewards_b:", "module:function", id="no name"),
        pytest.param("my_rewards_b:LIMIT", "int", id="no function but a number"),
        pytest.param("my_rewards_c:f", "SyntaxError", id="a broken module"),
    ],
)
def test_rewards_that_cannot_be_found_are_refused(tmp_path: Path, names: Any, named: str) -> None:
    (tmp_path / "my_rewards_b.py").write_text("LIMIT = 3\n")
    (tmp_path / "my_rewards_c.py").write_text("def f(:\n")
    before = list(sys.path)
    with pytest.raises(DataError) as caught:
        load_rewards(names, tmp_path)
    assert caught.value.code == "reward"
    assert named in str(caught.value)
    assert sys.path == before
