"""Which variables an error depended on, read from the source that raised it."""

from __future__ import annotations

import pytest
import torch

from graftkit.twins.batches.guards import guards_of


def _either(one, other):
    if one is None:
        if other is None:
            raise ValueError("say more")
    elif not other and one:
        raise ValueError("too much")
    return one


def _unconditional(one):
    if one:
        one = not one
    raise ValueError("never")


def _operation(one):
    if one is not None:
        return torch.ones(2) + torch.ones(3)
    return one


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: _either(None, None), ("other", "one")),
        (lambda: _either(1, None), ("one", "other")),
        (lambda: _unconditional(1), ()),
        (lambda: _operation(1), ()),
    ],
    ids=["nested", "otherwise", "unconditional", "no raise"],
)
def test_the_conditions_around_a_raise_are_named_from_inside_out(call, names):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    assert guards_of(caught.value) == names


def test_an_error_that_was_not_raised_has_none():
    assert guards_of(ValueError("never raised")) == ()


def test_where_there_is_no_source_there_are_none():
    with pytest.raises(ValueError, match="hidden") as caught:
        exec("def hidden(one):\n    if one:\n        raise ValueError('hidden')\nhidden(1)", {})
    assert guards_of(caught.value) == ()
