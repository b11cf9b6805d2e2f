"""Linears that share a weight: no role means them, a name does, and what that leads to is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.decisions import Caution
from graftkit.recipes.settings import CheckSettings

SHARED = "model.decoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    """Encoder and decoder read the same weights, each in modules of its own."""
    return gk.twin("diffusion_gemma")


@pytest.mark.parametrize(
    ("targets", "code"),
    [
        ("all-linear", "target-not-adaptable"),  # although it also means some that no gradient reaches
        ("attention", "target-not-adaptable"),
        (["attention", "mlp"], "plan-empty"),
    ],
)
def test_a_role_leaves_them_out(model: Any, targets: str | list[str], code: str) -> None:
    with pytest.raises(PlanError) as refused:
        gk.plan(model, targets=targets, scope="model.decoder")
    assert refused.value.code == code


def test_the_error_names_one_that_shares_its_weight_first(model: Any) -> None:
    with pytest.raises(PlanError) as refused:
        gk.plan(model, targets="all-linear", scope="model.decoder")
    (site,) = [site for site in gk.survey(model) if site.path == refused.value.where]
    assert site.tied_to


@pytest.mark.filterwarnings("ignore")
def test_a_name_adapts_them(model: Any) -> None:
    plan = gk.plan(model, targets=["q_proj", "v_proj"], scope="model.decoder")
    assert SHARED in {attached.path for attached in plan.attached}
    assert not [attached.path for attached in plan.attached if "encoder" in attached.path]
    assert {warning.caution for warning in plan.warnings} == {Caution.TIED}
    assert {path for warning in plan.warnings for path in warning.sites} == {a.path for a in plan.attached}

    adapted = gk.attach(copy.deepcopy(model), plan)
    rules = CheckSettings(select=("GK115", "GK203", "GK508", "GK601"))
    found = {
        finding.code: str(finding.severity)
        for finding in gk.verify(adapted, gk.example_batch(model), settings=rules)
    }
    # PEFT merges into the shared weight: the encoder changes too, and the check says so.
    assert found == {"GK115": "ok", "GK203": "ok", "GK508": "ok", "GK601": "error"}


def test_a_head_that_shares_the_embeddings_is_still_refused() -> None:
    with pytest.raises(PlanError) as refused:
        gk.plan("gemma3_text", targets=["lm_head"], scope="all")
    assert refused.value.code == "target-not-adaptable"
