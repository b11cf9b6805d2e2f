"""A wrapper is recognised by what it is, whatever it and its child are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graftkit as gk


class Clamped(nn.Module):
    def __init__(self, child: str = "linear") -> None:
        super().__init__()
        self.child = child
        setattr(self, child, nn.Linear(4, 4, bias=False))
        self.register_buffer("bound", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.child)(x).clamp(-self.bound, self.bound)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = Clamped()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(x) + 1


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.other = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.part(x))


@pytest.mark.parametrize(
    ("part", "path", "wrapper"),
    [
        pytest.param(Clamped(), "part.linear", ("Clamped", "part"), id="one level"),
        pytest.param(
            Clamped("projection_inner"), "part.projection_inner", ("Clamped", "part"), id="any child name"
        ),
        pytest.param(Outer(), "part.deep.linear", ("Outer", "part"), id="nested"),
        pytest.param(WithNorm(), "part.linear", None, id="a norm with weights is no wrapper"),
        pytest.param(TwoLinears(), "part.a", None, id="two linears are no wrapper"),
        pytest.param(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "part.0", None, id="a container is no wrapper"),
        pytest.param(nn.Linear(4, 4), "part", None, id="a bare linear"),
    ],
)
def test_wrappers_are_found_by_structure(part: nn.Module, path: str, wrapper: tuple[str, str] | None) -> None:
    site = gk.survey(Holder(part))[path]
    assert (site.wrapper and (site.wrapper.cls, site.wrapper.path)) == wrapper


@pytest.mark.parametrize(
    ("make", "bounded"),
    [
        pytest.param(lambda: Clamped(), True, id="finite"),
        pytest.param(lambda: Outer(), True, id="finite in an inner level"),
        pytest.param(lambda: with_bound(torch.tensor(torch.inf)), False, id="infinite"),
        pytest.param(lambda: with_bound(torch.empty((), device="meta")), True, id="not known"),
        pytest.param(lambda: with_bound(torch.tensor(3)), False, id="a counter"),
    ],
)
def test_a_wrapper_knows_whether_it_may_clamp(make: Callable[[], nn.Module], bounded: bool) -> None:
    site = next(site for site in gk.survey(Holder(make())) if site.wrapper)
    assert site.wrapper is not None
    assert site.wrapper.bounded is bounded


def with_bound(value: torch.Tensor) -> nn.Module:
    wrapper = Clamped()
    wrapper.bound = value
    return wrapper


def test_a_wrapped_site_answers_to_every_name_around_it() -> None:
    model_map = gk.survey(Holder(Outer()))
    site = model_map["part.deep.linear"]
    assert site.names == ("part.deep.linear", "part.deep", "part")
    assert model_map["part.deep"] is site


def test_an_unknown_path_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        gk.survey(Holder(Clamped()))["nowhere"]
