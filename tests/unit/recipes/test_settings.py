"""Which rules a user wants, and where that is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import RecipeError
from graftkit.recipes.settings import CheckSettings, project_settings


@pytest.mark.parametrize(
    ("select", "ignore", "wanted"),
    [
        pytest.param((), (), {"GK101", "GK202", "GK203"}, id="all"),
        pytest.param(("GK2",), (), {"GK202", "GK203"}, id="an area"),
        pytest.param((), ("GK20",), {"GK101"}, id="without an area"),
        pytest.param(("GK2",), ("GK203",), {"GK202"}, id="an area but one"),
        pytest.param(("GK203",), ("GK2",), {"GK203"}, id="one of an ignored area"),
        pytest.param(("GK203",), ("GK203",), set(), id="equally long: ignored"),
    ],
)
def test_prefixes(select: tuple[str, ...], ignore: tuple[str, ...], wanted: set[str]) -> None:
    settings = CheckSettings(select=select, ignore=ignore)
    assert {code for code in ("GK101", "GK202", "GK203") if settings.wants(code)} == wanted


_codes = st.from_regex(r"GK\d{3}", fullmatch=True)
_prefixes = st.lists(st.from_regex(r"GK\d{0,3}", fullmatch=True), max_size=3).map(tuple)


@given(select=_prefixes, ignore=_prefixes, code=_codes)
def test_more_ignored_is_never_more_wanted(select: tuple[str, ...], ignore: tuple[str, ...], code: str) -> None:
    fewer = CheckSettings(select=select, ignore=(*ignore, code[:3]))
    if fewer.wants(code):
        assert CheckSettings(select=select, ignore=ignore).wants(code)


def test_the_nearer_settings_win() -> None:
    near = CheckSettings(select=("GK1",), rules={"GK306": {"share": 0.2}})
    far = CheckSettings(select=("GK2",), ignore=("GK7",), rules={"GK306": {"share": 0.1, "severity": "error"}})
    both = near.over(far)
    assert both.select == ("GK1",)
    assert both.ignore == ("GK7",)
    assert both.rules["GK306"] == {"share": 0.2, "severity": "error"}


def test_settings_of_the_project_above(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.graftkit]\nignore = "GK7"\n[tool.graftkit.rules.GK306]\nshare = 0.5\n'
    )
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    settings = project_settings(inside)
    assert settings.ignore == ("GK7",)
    assert settings.rules["GK306"]["share"] == 0.5


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[tool.graftkit]\nignored = ['GK1']\n", id="unknown key"),
        pytest.param("[tool.graftkit]\nselect = 3\n", id="wrong type"),
        pytest.param("[tool.graftkit\n", id="no toml"),
        pytest.param("[tool]\ngraftkit = 3\n", id="no table"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        project_settings(tmp_path)
    assert caught.value.code == "settings"
    assert "pyproject.toml" in str(caught.value.where)
