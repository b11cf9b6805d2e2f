"""One site, and why the plan treats it as it does."""

from __future__ import annotations

import pytest
from torch import nn

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.decisions import LeftAlone
from graftkit.planning.explain import explain


def test_an_adapted_site_by_its_wrapper_s_name(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets=["q_proj"], scope=["vision"])
    explanation = explain(plan, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert explanation.site.path.endswith("q_proj.linear")
    assert (explanation.decision, explanation.via) == ("adapted", "target_modules")
    assert "Gemma4ClippableLinear" in str(explanation)


def test_a_site_left_alone_says_why(e2b: nn.Module) -> None:
    plan = gk.plan(e2b)
    explanation = explain(plan, "lm_head")
    skipped = next(s for s in plan.skipped if s.path == "lm_head")
    assert skipped.cause is LeftAlone.TIED
    assert (explanation.decision, explanation.reason) == ("left alone", skipped.reason)
    assert explanation.to_dict()["via"] is None


def test_every_site_can_be_explained(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, scope=["language", "audio"])
    decisions = {explain(plan, site.path).decision for site in plan.model}
    assert decisions == {"adapted", "left alone"}


def test_an_unknown_site_suggests_the_nearest(e2b: nn.Module) -> None:
    with pytest.raises(PlanError) as caught:
        explain(gk.plan(e2b), "model.language_model.layers.0.self_attn.q_prj")
    assert caught.value.code == "site-unknown"
    assert "q_proj" in (caught.value.help or "")
