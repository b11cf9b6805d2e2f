"""One request for every architecture: what a model lacks is passed over and said, what it has is adapted."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.errors import GraftError, PlanError
from graftkit.planning.decisions import LeftAlone, Shortfall
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.twins.shrink import shrink

REQUEST = ("attention", "mlp", "experts")

# Model type -> why each role of the request that it does not meet.
TYPES: dict[str, dict[str, Shortfall]] = {
    "llama": {},
    "gpt2": {},
    "bert": {},
    "albert": {},
    "t5": {},
    "vit": {},
    "whisper": {},
    "qwen2_moe": {},
    "deepseek_v3": {},
    "jamba": {},
    "jetmoe": {"mlp": Shortfall.STACKED_EXPERTS},
    "flex_olmo": {"mlp": Shortfall.STACKED_EXPERTS},
    "cohere2_moe": {"mlp": Shortfall.STACKED_EXPERTS},
    "mixtral": {"mlp": Shortfall.STACKED_EXPERTS},
    "fnet": {"attention": Shortfall.ROLE_UNCLEAR},
    "bamba": {"attention": Shortfall.ABSENT},
}


def on_meta(model_type: str) -> nn.Module:
    """A small model of the type, without weights."""
    loaded = load_config(model_type)
    return build_on_meta(shrink(loaded.config), model_class_of(loaded))


@pytest.mark.parametrize(("model_type", "unmet"), [pytest.param(k, v, id=k) for k, v in TYPES.items()])
def test_one_request_fits_and_stock_peft_takes_it(model_type: str, unmet: dict[str, Shortfall]) -> None:
    model = on_meta(model_type)
    plan = gk.plan(model, targets=REQUEST)
    assert {u.target: u.cause for u in plan.unmet} == unmet
    assert plan.unmatched == tuple(unmet)
    assert [u["target"] for u in plan.to_dict()["unmet"]] == list(unmet)
    assert all(f"{target}:" in str(plan) for target in unmet)
    adapted = get_peft_model(model, plan.peft_config)
    assert adapted_sites(adapted) == {a.target_path for a in plan.attached}


@pytest.mark.parametrize("model_type", ["jetmoe", "bamba"])
def test_strict_makes_a_missing_role_an_error(model_type: str) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(on_meta(model_type), targets=REQUEST, strict=True)
    assert caught.value.code == "target-unmatched"


def test_strict_asks_nothing_more_where_everything_is_met() -> None:
    assert not gk.plan(on_meta("llama"), targets=REQUEST, strict=True).unmet


def test_each_weight_of_a_role_that_cannot_be_adapted_says_why() -> None:
    model = on_meta("gemma2")
    plan = gk.plan(model, targets=["attention", "embeddings"])
    unmet = plan.unmet[0]
    assert (unmet.target, unmet.cause, unmet.sites) == (
        "embeddings",
        Shortfall.NOT_ADAPTABLE,
        ("model.embed_tokens",),
    )
    assert {s.path: s.cause for s in plan.skipped}["model.embed_tokens"] is LeftAlone.TIED
    assert not plan.unmatched
    with pytest.raises(PlanError) as caught:
        gk.plan(model, targets=["attention", "embeddings"], strict=True)
    assert caught.value.code == "target-not-adaptable"


def test_a_name_is_still_an_error_beside_roles() -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(on_meta("jetmoe"), targets=[*REQUEST, "q_prj"])
    assert caught.value.code == "target-unmatched"
    assert "q_prj" in caught.value.what


def test_without_anything_to_adapt_it_is_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(on_meta("mamba2"), targets=REQUEST)
    assert caught.value.code == "plan-empty"
    assert "ssm" in str(caught.value.help)


def test_a_role_that_the_method_cannot_adapt_is_passed_over() -> None:
    model = on_meta("mixtral")
    plan = gk.plan(model, targets=["attention", "experts"], method="ia3")
    assert [(u.target, u.cause) for u in plan.unmet] == [("experts", Shortfall.NOT_BY_METHOD)]
    assert {a.site.role.partition(".")[0] for a in plan.attached} == {"attention"}
    with pytest.raises(PlanError) as caught:
        gk.plan(model, targets=["attention", "experts"], method="ia3", strict=True)
    assert caught.value.code == "method-kind"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # hundreds of architectures warn about hundreds of things
def test_every_model_type_with_attention_or_mlps_can_be_planned() -> None:
    refused = {}
    planned = 0
    for model_type in CONFIG_MAPPING:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Without its architecture no twin is made: roles are what counts here.
                model_map = dataclasses.replace(gk.survey(model_type), architecture=None)
        except GraftError:
            continue
        able = {s.role.partition(".")[0] for s in model_map if s.adaptable and not s.tied_to}
        try:
            gk.plan(model_map, targets=REQUEST, scope="all")
            planned += 1
        except PlanError as error:
            if able & {"attention", "mlp", "expert"}:
                refused[model_type] = error.code
    assert not refused
    assert planned >= 500
