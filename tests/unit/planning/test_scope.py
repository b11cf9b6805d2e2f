"""Scopes on models of which some modules belong to no known tower: asked about, never included unasked."""

from __future__ import annotations

import pytest
from tests.unit.surveying.handmade import Composite, Encoder, Patches, rename
from torch import nn

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.decisions import LeftAlone


def features_and_text() -> nn.Module:
    """Return a model of which nothing says what feeds ``a``; ``b`` is a projector, ``c`` the language model."""
    return Composite(Encoder(nn.Linear(40, 32), 32))


def adapted(model: nn.Module, scope: str | list[str] | None, targets: str = "all-linear") -> dict[str, int]:
    """Return how many sites a plan adapts in each of the model's children."""
    plan = gk.plan(model, targets=targets, scope=scope)
    parts = [a.path.partition(".")[0] for a in plan.attached]
    live = gk.attach(model, plan)
    assert {type(m).__name__ for m in live.modules() if hasattr(m, "lora_A")} <= {"Linear", "Embedding", "Conv2d"}
    return {part: parts.count(part) for part in dict.fromkeys(parts)}


@pytest.mark.parametrize("scope", ["language", ["language", "projector"]])
def test_a_scope_of_towers_is_refused_where_it_would_have_to_guess(scope: str | list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(features_and_text(), scope=scope)
    assert (caught.value.code, caught.value.where) == ("tower-unknown", "a")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param(["language", "unknown"], {"a": 13, "c": 13}, id="with unknown"),
        pytest.param("all", {"a": 13, "b": 2, "c": 13}, id="all"),
        pytest.param(None, {"c": 13}, id="none: what every batch feeds"),
        pytest.param(["c"], {"c": 13}, id="the language model by its path"),
        pytest.param(["language", "a.blocks.0"], {"a": 6, "c": 13}, id="a tower, and a part of the other by path"),
        pytest.param("b", {"b": 2}, id="one path"),
    ],
)
def test_a_scope_says_what_becomes_of_them(scope: str | list[str] | None, expected: dict[str, int]) -> None:
    assert adapted(features_and_text(), scope) == expected


def test_targets_that_name_none_of_them_are_not_asked_about() -> None:
    assert adapted(features_and_text(), "language", "embed") == {"c": 1}


def test_a_tower_that_is_seen_is_left_alone_whatever_its_name() -> None:
    for scope, expected in (("language", {"vision_tower": 13}), ("vision", {"language_model": 12})):
        model = rename(Composite(Encoder(Patches(32), 32)), a="language_model", c="vision_tower")
        assert adapted(model, scope) == expected


def test_what_is_left_alone_says_why() -> None:
    plan = gk.plan(features_and_text())
    left = {s.cause for s in plan.skipped if s.site.tower == "unknown"}
    assert left == {LeftAlone.OUT_OF_SCOPE}
    part = gk.plan(features_and_text(), scope=["c.layers.0"])
    assert {s.path for s in part.skipped if s.cause is LeftAlone.OUT_OF_SCOPE} == {
        site.path for site in part.model if not site.path.startswith("c.layers.0.")
    }
    assert {row.tower: row.reached for row in part.layers if row.reached} == {"language": 1}
    assert str(part)


@pytest.mark.parametrize("scope", ["a.blok", "c.layers.7", "visoin"])
def test_neither_a_tower_nor_a_module(scope: str) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(features_and_text(), scope=scope)
    assert caught.value.code == "scope-missing"


def test_a_model_of_which_nothing_is_known_is_adapted_without_a_scope() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert adapted(model, None) == {"0": 1, "1": 1}
    with pytest.raises(PlanError) as caught:
        gk.plan(model, scope="language")
    assert caught.value.code == "scope-missing"


def test_towers_of_embeddings_alone_are_no_default() -> None:
    # Text and pictures enter, and meet in layers of which nothing tells the tower.
    model_map = gk.survey("lxmert")
    assert {s.kind for s in model_map if s.tower == "language"} == {"embedding"}
    plan = gk.plan(model_map)
    assert set(plan.scope) == {"language", "unknown"}
    assert any(".x_layers." in a.path for a in plan.attached)
