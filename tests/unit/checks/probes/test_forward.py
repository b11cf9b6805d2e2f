"""How far two outputs are apart: what is masked in both is equal, what overflows never is."""

from __future__ import annotations

import math

import pytest
import torch

from graftkit.checks.probes.forward import difference

INF, NAN = math.inf, math.nan


def test_what_is_masked_in_both_is_left_out() -> None:
    assert difference(torch.tensor([4.0, -INF, 2.0]), torch.tensor([4.0, -INF, 3.0])) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, -INF], [1.0, 1.0]),
        ([1.0, INF], [1.0, INF]),
        ([1.0, NAN], [1.0, NAN]),
        ([-INF, -INF], [-INF, -INF]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_what_cannot_be_compared_is_never_equal(first: list[float], second: list[float]) -> None:
    assert difference(torch.tensor(first), torch.tensor(second)) == INF
