"""Attaching proves its postconditions, or takes the adapter off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
    with pytest.raises(AttachError) as caught:
        gk.attach(adapted, plan)
    assert caught.value.code == "attach-already-adapted"
