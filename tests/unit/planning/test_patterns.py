"""Patterns in the user's own words reach exactly the meant sites, in PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

import graftkit as gk
from graftkit.errors import PlanError

E2B = "google/gemma-4-E2B-it"
MOE = "google/gemma-4-26B-A4B-it"


def ranks(adapted: nn.Module) -> dict[str, int]:
    from peft.tuners.lora import LoraLayer, ParamWrapper

    found = {}
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            clean = path.replace(".base_layer", "")
            name = f"{clean}.{module.parameter_name}" if isinstance(module, ParamWrapper) else clean
            found[name] = module.r["default"]
    return found


PATTERNS = [
    pytest.param(
        E2B,
        {"scope": ["language", "vision"], "targets": ["attention"]},
        {"vision": 4},
        lambda s: s.tower == "vision",
        id="a tower",
    ),
    pytest.param(
        E2B,
        {"scope": ["vision", "audio"]},
        {"q_proj": 4},
        lambda s: s.role == "attention.q",
        id="a wrapper's name",
    ),
    pytest.param(
        E2B,
        {"scope": ["language", "audio"], "targets": ["attention"]},
        {"o_proj": 4},
        lambda s: s.role == "attention.o",
        id="a usual name that one tower spells differently",
    ),
    pytest.param(E2B, {"scope": "all"}, {"mlp": 4}, lambda s: s.role.startswith("mlp"), id="a role"),
    pytest.param(
        E2B,
        {"scope": ["vision"]},
        {r"layers\.0\.self_attn\.q_proj": 4},
        lambda s: "layers.0.self_attn.q_proj" in s.path,
        id="a regular expression on a wrapper, as PEFT reads them",
    ),
    pytest.param(
        E2B,
        {"scope": ["vision"]},
        {"model.vision_tower.encoder.layers.1.mlp.up_proj": 4},
        lambda s: s.path.endswith("layers.1.mlp.up_proj.linear"),
        id="one wrapper's full path",
    ),
    pytest.param(
        MOE,
        {"targets": ["attention", "experts"]},
        {"experts": 4},
        lambda s: s.role == "expert" or s.role.startswith("mlp"),
        id="experts, which are bare parameters",
        # PEFT says so of every key that matches parameters only, and uses it all the same.
        marks=pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    ),
]


@pytest.mark.parametrize(("name", "request_", "pattern", "meant"), PATTERNS)
def test_a_pattern_reaches_the_meant_sites_and_no_other(
    twin_of: Callable[[str], nn.Module],
    name: str,
    request_: dict[str, Any],
    pattern: dict[str, int],
    meant: Callable[[Any], bool],
) -> None:
    model = twin_of(name)
    plan = gk.plan(model, r=2, rank_pattern=pattern, **request_)
    expected = {a.path: 4 if meant(a.site) else 2 for a in plan.attached}
    assert {2, 4} == set(expected.values())
    adapted = get_peft_model(model, plan.peft_config)
    assert ranks(adapted) == expected
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params


def test_the_first_of_two_keys_for_a_site_wins(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, r=2, targets=["attention"], rank_pattern={"q_proj": 8, "attention": 4})
    found = ranks(get_peft_model(e2b, plan.peft_config))
    assert {rank for path, rank in found.items() if "q_proj" in path} == {8}
    assert {rank for path, rank in found.items() if "q_proj" not in path} == {4}


def test_alpha_patterns_are_rekeyed_as_well(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, r=2, scope=["vision"], targets=["attention"], alpha_pattern={"q_proj": 8})
    adapted = get_peft_model(e2b, plan.peft_config)
    scales = {
        path: module.scaling["default"]
        for path, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    assert scales
    assert all(scale == (4.0 if "q_proj" in path else 1.0) for path, scale in scales.items())


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        pytest.param("loha", "rank_pattern", 4, id="loha"),
        pytest.param("delora", "rank_pattern", 4, id="delora"),
        pytest.param("c3a", "block_size_pattern", 16, id="c3a, which wants a dot before the key"),
        pytest.param("fourierft", "n_frequency_pattern", 50, id="fourierft, likewise"),
        pytest.param("waveft", "n_frequency_pattern", 50, id="waveft"),
        pytest.param("osf", "rank_pattern", 8, id="osf, which searches anywhere in the path"),
    ],
)
def test_other_methods_read_the_keys_too(e2b: nn.Module, method: str, option: str, value: int) -> None:
    request_: dict[str, Any] = {"scope": ["vision"], "targets": ["attention"], "method": method}
    without = gk.plan(e2b, **request_).trainable_params
    plan = gk.plan(e2b, **request_, **{option: {"q_proj": value, "layers.0.self_attn.k_proj": value}})
    assert plan.trainable_params != without
    adapted = get_peft_model(e2b, plan.peft_config)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        pytest.param({"rank_pattern": {"q_prj": 4}}, "q_proj", id="misspelt"),
        pytest.param({"alpha_pattern": {"visoin": 4}}, "vision", id="misspelt tower"),
        pytest.param(
            {"rank_pattern": {"per_layer_input_gate": 4}}, "layers.0.per_layer_input_gate", id="not planned"
        ),
        pytest.param({"rank_pattern": {"(q_proj": 4}}, "q_proj", id="broken regular expression"),
    ],
)
def test_a_key_that_matches_no_planned_site_is_refused(
    e2b: nn.Module, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(e2b, targets=["attention"], scope=["language", "vision"], **request_)
    assert caught.value.code == "pattern-unmatched"
    assert said in str(caught.value)
    assert caught.value.help


def test_a_pattern_that_the_method_takes_and_does_not_use_is_refused(e2b: nn.Module) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(e2b, scope=["vision"], targets=["attention"], method="hira", rank_pattern={"q_proj": 4})
    assert caught.value.code == "pattern-ignored"
