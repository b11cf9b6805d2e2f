"""Expressions of a recipe: arithmetic over fields, and nothing that runs code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.twins.batches.expressions import call_arguments, evaluate

NAMES = {
    "B": 2,
    "vision_config": SimpleNamespace(patch_size=14, image_size=[28, 56]),
    "size": {"height": 7},
    "add": lambda *values: sum(values),
}


def _evaluate(expression):
    return evaluate(expression, NAMES.__getitem__)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("B * (2 + 1) ** 2", 18),
        ("vision_config.patch_size // 4 % 2", 1),
        ("vision_config.image_size[1] - 6", 50),
        ("vision_config.image_size[-1]", 56),
        ("size['height']", 7),
        ("[1] * B + [vision_config.patch_size]", [1, 1, 14]),
        ("add(B, add(1, 2))", 5),
        ("True", True),
        ("0.5", 0.5),
    ],
)
def test_arithmetic_fields_items_and_calls(expression, value):
    assert _evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "B.__class__",
        "vision_config._private",
        "(lambda: 1)()",
        "add.__call__(1)",
        "add(1)(2)",
        "add(start=1)",
        "[x for x in size]",
        "B if B else 0",
        "B and 1",
        "f'{B}'",
        "B +",
        "x = 1",
    ],
)
def test_everything_else_is_refused(expression):
    with pytest.raises(ValueError, match=r"expression"):
        _evaluate(expression)


def test_names_that_are_not_there_are_errors_of_their_own():
    with pytest.raises(LookupError):
        _evaluate("nothing")
    with pytest.raises(AttributeError):
        _evaluate("vision_config.depth")


whole = st.integers(-50, 50)
trees = st.recursive(
    whole.map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=12,
)


@given(trees)
def test_arithmetic_is_that_of_python(expression):
    assert _evaluate(expression) == eval(expression)


@given(st.lists(trees, min_size=1, max_size=4))
def test_arguments_of_a_call_keep_their_values(arguments):
    name, found = call_arguments(f"add({', '.join(arguments)})")
    assert name == "add"
    assert [_evaluate(text) for text in found] == [_evaluate(text) for text in arguments]


def test_what_is_no_call_has_no_arguments():
    assert call_arguments("B * 2") == ("", [])
