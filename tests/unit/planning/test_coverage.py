"""How far a plan reaches, in sites, weights and layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import graftkit as gk
from graftkit.planning.coverage import layers_reached


@pytest.mark.parametrize(
    ("name", "targets", "reached"),
    [
        pytest.param("llama", ["q_proj"], {"language": (2, 2)}, id="every layer"),
        pytest.param("nemotron_h", ["q_proj"], {"language": (1, 4)}, id="a hybrid has attention in some layers"),
        pytest.param("nemotron_h", ["all-linear", "experts"], {"language": (4, 4)}, id="a hybrid, everything"),
    ],
)
def test_layers_reached(
    twin_of: Callable[[str], nn.Module], name: str, targets: list[str], reached: dict[str, tuple[int, int]]
) -> None:
    plan = gk.plan(twin_of(name), targets=targets)
    rows = layers_reached(plan.model, {a.path for a in plan.attached})
    assert {row.tower: (row.reached, row.layers) for row in rows} == reached


def test_a_plan_prints_how_many_layers_it_reaches(twin_of: Callable[[str], nn.Module]) -> None:
    assert "1 of 4 language layers" in str(gk.plan(twin_of("nemotron_h"), targets=["q_proj"]))


@pytest.mark.parametrize(
    "name",
    ["mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "qwen3_moe", "qwen3_5_moe_text", "granitemoe",
     "nemotron_h", "google/gemma-4-26B-A4B-it"],
)  # fmt: skip
def test_one_request_covers_the_same_roles_on_every_mixture_of_experts(
    twin_of: Callable[[str], nn.Module], name: str
) -> None:
    """Routed experts wherever they are stored, and the dense and shared MLPs beside them."""
    plan = gk.plan(twin_of(name), targets=["attention", "experts"], r=2)
    rows = [row for row in plan.coverage if row.tower == "language"]
    asked = [r for r in rows if r.role == "expert" or r.role.startswith(("mlp", "attention"))]
    assert any(row.role == "expert" for row in asked)
    assert {row.role: row.share for row in asked if row.share < 1.0} == {}
