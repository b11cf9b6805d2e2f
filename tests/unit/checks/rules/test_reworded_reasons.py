"""Rules decide on a site's obstacle: rewording the reason for people must not switch one off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import graftkit as gk
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import run
from graftkit.checks.rules import all_rules


def reworded(model_map: gk.ModelMap) -> gk.ModelMap:
    """The map with another text for every reason."""
    sites = (
        replace(site, objection=site.objection and replace(site.objection, reason="reworded"))
        for site in model_map
    )
    return replace(model_map, sites=tuple(sites))


@pytest.mark.parametrize(
    ("code", "name", "config"),
    [
        pytest.param("GK108", "llama4", {"target_modules": ["q_proj", "router"]}, id="a forward of its own"),
        pytest.param("GK110", "qwen3_next", {"target_modules": ["q_proj", "conv1d"], "r": 128}, id="bypassed"),
        pytest.param("GK101", "qwen3_next", {"target_modules": ["conv1d"], "r": 3}, id="convolution in groups"),
    ],
)
def test_a_reworded_reason_changes_no_verdict(
    twin_of: Callable[[str], nn.Module], code: str, name: str, config: dict[str, Any]
) -> None:
    rules = [rule for rule in all_rules() if rule.code == code]
    surveyed = gk.survey(twin_of(name))
    found = [
        next(iter(run(rules, CheckContext(Inputs(peft_config=config, base=base)))))
        for base in (surveyed, reworded(surveyed))
    ]
    assert [f.severity for f in found] == [gk.Severity.ERROR] * 2
    assert found[0].where == found[1].where
