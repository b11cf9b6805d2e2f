"""One rounding, to nearest and ties to even, against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.merging.arithmetic.rounding import rounded

TYPES = [torch.bfloat16, torch.float16, torch.float32]


def neighbours(value: torch.Tensor) -> list[torch.Tensor]:
    whole = {2: torch.int16, 4: torch.int32}[value.element_size()]
    bits = value.view(whole)
    return [(bits + step).view(value.dtype) for step in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@settings(max_examples=400, deadline=None)
@given(st.floats(min_value=2**-10, max_value=1000.0), st.sampled_from([0.0, 1e-9, -1e-9, 3e-13]))
def test_no_neighbour_is_nearer(dtype: torch.dtype, start: float, nudge: float) -> None:
    """Values at and next to the middle between two neighbours are where a second rounding shows."""
    near = torch.tensor([start]).to(dtype)
    _, here, above = neighbours(near)
    middle = (here.double() + above.double()) / 2
    exact = middle * (1 + nudge)
    got = rounded(exact.clone(), dtype)
    wanted = Fraction(exact.item())
    distance = abs(Fraction(got.double().item()) - wanted)
    for other in neighbours(got):
        assert distance <= abs(Fraction(other.double().item()) - wanted)
    if nudge == 0.0:
        assert got.item() == middle.to(dtype).item(), "ties go to even"


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_what_is_no_number_stays(dtype: torch.dtype) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e300, -1e300], dtype=torch.float64)
    got, wanted = rounded(special.clone(), dtype), special.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(got.signbit()[1:], wanted.signbit()[1:])


@pytest.mark.parametrize("dtype", TYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("count", [255, 256, 2**17 + 300], ids=["less than a run", "a run", "more than a part"])
def test_long_vectors_round_like_single_numbers(dtype: torch.dtype, count: int) -> None:
    """Nearly all elements of a long vector are converted together: the few in the middle have to be found."""
    draw = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=draw).to(dtype)
    middle = (start.double() + neighbours(start)[2].double()) / 2
    nudge = torch.tensor([0.0, 1e-12, -1e-12])[torch.randint(3, (count,), generator=draw)]
    rare = torch.rand(count, generator=draw) < 0.01
    exact = torch.where(rare, middle * (1 + nudge.double()), start.double() * 1.0001)
    got = rounded(exact, dtype)
    distance = (got.double() - exact).abs()
    for other in (neighbours(got)[0], neighbours(got)[2]):
        assert bool((distance <= (other.double() - exact).abs()).all())
    ties = rare & (nudge == 0)
    assert bool((got[ties].view(torch.int16) % 2 == 0).all())
    assert torch.cat([rounded(one, dtype) for one in exact.view(-1, 1)[-300:]]).equal(got[-300:])


def test_torch_alone_rounds_twice() -> None:
    """Were this to pass with torch's own conversion, the whole module could go."""
    tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert tie.to(torch.bfloat16).item() == 1.0
    assert rounded(tie.clone(), torch.bfloat16).item() == 1 + 2**-7
