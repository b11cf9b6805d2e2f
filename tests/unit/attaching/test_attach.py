"""Attaching proves its postconditions, or takes the adapter off again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites, check_against_plan
from graftkit.errors import AttachError


def test_stock_peft_refuses_what_graftkit_attaches(
    twin_of: Callable[[str], nn.Module], usual_seven: tuple[str, ...]
) -> None:
    name = "google/gemma-4-E2B-it"
    with pytest.raises(ValueError, match=r"(?s)Target module Gemma4ClippableLinear.*is not supported"):
        get_peft_model(twin_of(name), LoraConfig(target_modules=list(usual_seven)))
    model = twin_of(name)
    adapted = gk.attach(model, gk.plan(model, targets=usual_seven, scope=["language", "vision"]))
    assert any("vision_tower" in path for path in adapted_sites(adapted))


def test_only_the_adapter_is_trainable(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, scope="all", r=2))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_the_plan_is_not_changed_by_attaching(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("mixtral")
    plan = gk.plan(model, targets=["all-linear", "experts"], r=2)
    before = plan.to_dict()
    gk.attach(model, plan)
    assert plan.to_dict() == before


def test_a_plan_for_another_model_is_refused_before_anything_is_touched(
    twin_of: Callable[[str], nn.Module],
) -> None:
    model = twin_of("llama")
    with pytest.raises(AttachError) as caught:
        gk.attach(model, gk.plan("google/gemma-4-E2B-it"))
    assert caught.value.code == "attach-other-model"
    assert not adapted_sites(model)


@pytest.mark.parametrize(
    ("field", "value", "missing"),
    [
        pytest.param("hidden_size", 128, 0, id="wider"),
        pytest.param("intermediate_size", 96, 0, id="other feed-forward"),
        pytest.param("num_hidden_layers", 1, 7, id="fewer layers"),
    ],
)
def test_a_plan_for_another_size_of_the_same_class_is_refused(
    twin_of: Callable[[str], Any], field: str, value: int, missing: int
) -> None:
    planned = twin_of("llama")
    config = copy.deepcopy(planned.config)
    setattr(config, field, value)
    model = type(planned)(config)
    plan = gk.plan(planned, r=2, scope=["language"])
    sites = gk.survey(model).by_path
    others = [a.site for a in plan.attached if a.path in sites and sites[a.path].shape != a.site.shape]
    with pytest.raises(AttachError) as caught:
        gk.attach(model, plan)
    error = caught.value
    assert error.code == "attach-other-model"
    assert len([a for a in plan.attached if a.path not in sites]) == missing
    if others:
        assert error.where == others[0].path
        assert all(str(list(s.shape)) in str(error.why) for s in (others[0], sites[others[0].path]))
        assert f"{len(others)} of {len(plan.attached)}" in str(error.why)
    if missing:
        assert f"{missing} of {len(plan.attached)}" in str(error.why)
    assert "scope=['language']" in str(error.help)
    assert not adapted_sites(model)
    assert adapted_sites(gk.attach(model, gk.plan(model, r=2))), "the model was changed"


@pytest.mark.parametrize(
    ("targets", "site"),
    [
        pytest.param(["q_proj"], "k_proj", id="too few"),
        pytest.param(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "up_proj", id="too many"),
    ],
)
def test_a_configuration_that_does_something_else_is_an_error_and_undone(
    twin_of: Callable[[str], nn.Module], targets: list[str], site: str
) -> None:
    model = twin_of("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = gk.plan(model, targets=["attention"], r=2)
    wrong = dataclasses.replace(plan, peft_config=LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    with pytest.raises(AttachError) as caught:
        gk.attach(model, wrong)
    assert caught.value.code == "attach-postcondition"
    assert site in str(caught.value.where)
    assert not adapted_sites(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_adapter_name_works(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    adapted = gk.attach(model, gk.plan(model, r=2), adapter_name="mine")
    assert adapted_sites(adapted, "mine")
    assert not adapted_sites(adapted, "default")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"trainable_token_indices": [1, 2]}, id="trainable tokens"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="modules to save"),
        pytest.param({"bias": "all"}, id="biases"),
        pytest.param({"rank_pattern": {"q_proj": 4}}, id="rank pattern"),
    ],
)
def test_what_is_trained_beside_the_sites_is_no_violation(
    twin_of: Callable[[str], nn.Module], options: dict[str, object]
) -> None:
    model = twin_of("llama")
    adapted = gk.attach(model, gk.plan(model, r=2, **options))
    assert adapted_sites(adapted)


def test_more_trainable_parameters_than_planned_are_a_violation(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, targets=["attention"], r=2)
    fewer = dataclasses.replace(plan, trainable_params=plan.trainable_params - 8)
    with pytest.raises(AttachError, match=str(fewer.trainable_params)) as caught:
        gk.attach(model, fewer)
    assert caught.value.code == "attach-postcondition"
    assert all(p.requires_grad for p in model.parameters())


def test_fewer_parameters_than_planned_are_none_where_the_weights_decide(
    twin_of: Callable[[str], nn.Module],
) -> None:
    """AdaMSS clusters each weight's outputs: a cluster smaller than its rank has fewer parameters."""
    model = twin_of("clip")
    plan = gk.plan(model, targets="all-linear", scope="all", method="adamss")
    adapted = gk.attach(model, plan)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 0.9 * plan.trainable_params < trainable <= plan.trainable_params


def test_a_stray_trainable_parameter_is_a_violation(twin_of: Callable[[str], nn.Module]) -> None:
    """A configuration that also trains biases of the base, which the plan did not mention."""
    model = twin_of("bert")
    plan = gk.plan(model, targets=["attention"], r=2)
    config = LoraConfig(**{**plan.peft_config.to_dict(), "bias": "all", "task_type": None})
    adapted = get_peft_model(model, config)
    with pytest.raises(AttachError) as caught:
        check_against_plan(adapted, plan)
    assert caught.value.code == "attach-postcondition"
    assert ".bias" in str(caught.value.where)


def test_attaching_twice_is_refused(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, r=2)
    adapted = gk.attach(model, plan)
    before = adapted.state_dict()
    # The base, too, has the adapter in its layers.
    for again in (adapted, model):
        with pytest.raises(AttachError) as caught:
            gk.attach(again, plan, adapter_name="second")
        assert caught.value.code == "attach-already-adapted"
        assert "default" in str(caught.value.why)
    assert adapted.state_dict().keys() == before.keys()
    assert gk.attach(adapted.unload(), plan)


def test_an_adapter_that_transformers_attached_is_noticed(twin_of: Callable[[str], Any]) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, r=2)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="own")
    with pytest.raises(AttachError) as caught:
        gk.attach(model, plan)
    assert caught.value.code == "attach-already-adapted"
    assert "own" in str(caught.value.why)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_prompt_tuning_is_an_adapter_too(twin_of: Callable[[str], nn.Module]) -> None:
    adapted = get_peft_model(twin_of("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(AttachError) as caught:
        gk.attach(adapted, gk.plan("llama"))
    assert caught.value.code == "attach-already-adapted"
