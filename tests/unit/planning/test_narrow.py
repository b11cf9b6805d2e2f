"""A decomposition cannot give a layer more directions than it has: the plan leaves such layers alone."""

from __future__ import annotations

from typing import Any

import pytest

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.decisions import LeftAlone

# Qwen2-MoE's gate of the shared expert has one output.
GATE = "model.layers.0.mlp.shared_expert_gate"


@pytest.fixture(scope="module")
def model() -> Any:
    return gk.twin("qwen2_moe")


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "corda", "lora_ga"])
def test_a_layer_without_so_many_directions_is_left_alone(model: Any, init: str) -> None:
    plan = gk.plan(model, r=2, init_lora_weights=init)
    (left,) = [skipped for skipped in plan.skipped if skipped.path == GATE]
    assert left.cause is LeftAlone.TOO_NARROW
    assert GATE not in {attached.path for attached in plan.attached}
    batches = [gk.example_batch(model, batch_size=8, seed=seed) for seed in range(2)]
    adapted = gk.initialize(gk.twin(model), plan, batches)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


def test_its_own_rank_lets_it_stay(model: Any) -> None:
    plan = gk.plan(model, r=2, init_lora_weights="pissa", rank_pattern={"shared_expert_gate": 1})
    assert GATE in {attached.path for attached in plan.attached}
    gk.attach(gk.twin(model), plan)


@pytest.mark.parametrize("init", [True, "gaussian", "eva"])
def test_what_only_draws_has_no_limit(model: Any, init: Any) -> None:
    assert GATE in {attached.path for attached in gk.plan(model, r=2, init_lora_weights=init).attached}


def test_a_target_of_which_nothing_is_left_is_refused(model: Any) -> None:
    with pytest.raises(PlanError) as refused:
        gk.plan(model, targets=["q_proj", "shared_expert_gate"], r=2, init_lora_weights="pissa")
    assert refused.value.code == "initializer-rank"
    assert refused.value.where == GATE
