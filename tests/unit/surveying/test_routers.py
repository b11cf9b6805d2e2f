"""A router is recognised by its outputs, one for each expert beside it, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graftkit as gk

WIDTH, EXPERTS = 6, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, 10)
        self.two = nn.Linear(10, WIDTH)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(EXPERTS, 20, WIDTH))
        self.second = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 10))


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, WIDTH))
        self.bias = nn.Parameter(torch.zeros(EXPERTS))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.proj = nn.Linear(WIDTH, EXPERTS, bias=False)


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(9, 1, 1))


def block(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def branches() -> nn.ModuleList:
    return nn.ModuleList(Expert() for _ in range(EXPERTS))


def linear(inputs: int = WIDTH, outputs: int = EXPERTS) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "stacked, beside": (lambda: block(pick=linear(), pool=Stacked()), {"pick"}),
    "stacked in the block itself": (lambda: block(pick=linear(), inner=block(pool=Stacked())), {"pick"}),
    "a bare matrix": (lambda: block(pick=Chooser(), pool=Stacked()), {"pick.weight"}),
    "inside a module with a scale": (lambda: block(pick=Scaled(), pool=Stacked()), {"pick.proj"}),
    "a list of modules": (lambda: block(pick=linear(), pool=branches()), {"pick"}),
    "a shared expert's gate is none": (
        lambda: block(pick=linear(), pool=Stacked(), shared=Expert(), shared_expert_gate=linear(outputs=1)),
        {"pick"},
    ),
    "another linear of as many outputs is none": (
        lambda: block(pick=linear(), pool=Stacked(), attn=block(a=linear(), b=linear())),
        {"pick"},
    ),
    "another input width is none": (lambda: block(pick=linear(inputs=7), pool=Stacked()), set()),
    "a scale of each channel is no expert": (lambda: block(pick=linear(1, 9), pool=Scales()), set()),
    "a convolution is no expert": (
        lambda: block(pick=linear(), conv=nn.ConvTranspose1d(EXPERTS, WIDTH, 3)),
        set(),
    ),
    "experts unlike each other": (
        lambda: block(pick=linear(), pool=nn.ModuleList([*branches()[1:], linear()])),
        set(),
    ),
    "a gate without experts": (lambda: block(gate=linear(WIDTH, WIDTH), value=linear(WIDTH, WIDTH)), set()),
    "a gate of another number, by name": (lambda: block(gate=linear(outputs=7), experts=Stacked()), {"gate"}),
    "a router, by name": (lambda: block(router=linear(outputs=7)), {"router"}),
}


@pytest.mark.parametrize(("make", "routers"), [pytest.param(*case, id=name) for name, case in BLOCKS.items()])
def test_routers(make: Callable[[], nn.Module], routers: set[str]) -> None:
    model = block(layers=nn.ModuleList([make(), make()]))
    found = {site.path for site in gk.survey(model) if site.role == "router"}
    assert found == {f"layers.{n}.{path}" for n in range(2) for path in routers}


def test_a_classifier_of_as_many_classes_as_layers_is_no_router() -> None:
    model = block(layers=branches(), score=linear())
    assert not [site.path for site in gk.survey(model) if site.role == "router"]


def test_what_a_router_chooses_is_experts() -> None:
    model = block(layers=nn.ModuleList([block(pick=linear(), pool=Stacked())]))
    assert {s.path for s in gk.survey(model) if s.role == "expert"} == {
        "layers.0.pool.first",
        "layers.0.pool.second",
    }


def test_all_linear_leaves_the_router_alone() -> None:
    plan = gk.plan(block(layers=nn.ModuleList([block(pick=linear(), pool=branches())])))
    assert not [a.path for a in plan.attached if a.path.endswith("pick")]
    assert len(plan.attached) == 2 * EXPERTS


def test_a_list_of_what_also_stands_elsewhere_is_read() -> None:
    shared = branches()
    model = block(first=shared[0], again=shared, layers=nn.ModuleList([block(a=shared[1], pool=branches())]))
    assert not [site.path for site in gk.survey(model) if site.role == "router"]
