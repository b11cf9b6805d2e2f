"""A YAML file that knows its lines and survives an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import RecipeError
from graftkit.recipes.document import read_document

TEXT = """\
# what we train
model: google/gemma-4-E2B-it  # the small one
adapter:
  targets: [q_proj, v_proj]
args:
  packing: true
  nested:
    deeper: "1e-4"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("key", "place"),
    [
        pytest.param(("model",), (2, 1), id="top"),
        pytest.param(("args", "packing"), (6, 3), id="nested"),
        pytest.param(("args", "nested", "deeper"), (8, 5), id="deeper"),
        pytest.param(("adapter", "targets", 1), (4, 21), id="item of a list"),
        pytest.param(("args", "absent"), (5, 1), id="absent: its parent"),
        pytest.param(("absent",), None, id="absent at the top"),
    ],
)
def test_a_key_has_a_place(file: Path, key: tuple[str | int, ...], place: tuple[int, int] | None) -> None:
    assert read_document(file).place(key) == place


def test_an_edit_changes_one_line_and_no_comment(file: Path) -> None:
    read_document(file).write({("args", "packing"): False}, [("adapter", "absent")])
    assert file.read_text() == TEXT.replace("packing: true", "packing: false")


def test_an_edit_makes_the_parents_it_needs(file: Path) -> None:
    read_document(file).write({("args", "checkpointing", "use_reentrant"): False}, [("model",)])
    plain = read_document(file).plain()
    assert plain["args"]["checkpointing"] == {"use_reentrant": False}
    assert "model" not in plain


def test_plain_values_are_plain(file: Path) -> None:
    plain = read_document(file).plain()
    assert type(plain) is dict
    assert type(plain["adapter"]["targets"]) is list
    assert type(plain["args"]["packing"]) is bool
    assert type(plain["args"]["nested"]["deeper"]) is str


@pytest.mark.parametrize(
    ("text", "where"),
    [
        pytest.param("a: [1, 2\nb: 3", ":2:", id="open bracket"),
        pytest.param("a: 1\na: 2", ":2:", id="duplicate key"),
        pytest.param("- 1\n- 2", "", id="a list"),
        pytest.param("", "", id="empty"),
        pytest.param("a: !!python/object:os.system {}", "", id="a tag that would run code is data at most"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    if "python/object" in text:
        assert isinstance(read_document(path).plain()["a"], dict)
        return
    with pytest.raises(RecipeError) as caught:
        read_document(path)
    assert caught.value.code == "recipe-syntax"
    assert where in str(caught.value.where)


def test_a_large_or_binary_file_is_refused(tmp_path: Path) -> None:
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_bytes(b"a" * (2**20 + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (large, binary):
        with pytest.raises(RecipeError) as caught:
            read_document(path)
        assert caught.value.code == "recipe-syntax"
    with pytest.raises(RecipeError) as caught:
        read_document(tmp_path / "absent.yaml")
    assert caught.value.code == "recipe-not-found"


_scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text("abc :#'\"-[]{}\n", max_size=8)
_values = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(value=_values)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(TEXT)
    read_document(path).write({("args", "packing"): value})
    assert read_document(path).plain()["args"]["packing"] == value
    assert path.read_text().startswith("# what we train\nmodel: google/gemma-4-E2B-it  # the small one\n")
