"""A plan is exact: stock PEFT adapts what it says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.errors import PlanError
from graftkit.planning.decisions import LeftAlone

E2B = "google/gemma-4-E2B-it"
MOE = "google/gemma-4-26B-A4B-it"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


REQUESTS = [
    pytest.param(E2B, {}, id="gemma4 default"),
    pytest.param(E2B, {"scope": "all"}, id="gemma4 all towers"),
    pytest.param(E2B, {"scope": ["language", "vision"]}, id="gemma4 language and vision"),
    pytest.param(E2B, {"scope": ["vision"]}, id="gemma4 vision"),
    pytest.param(E2B, {"scope": ["audio"], "targets": ["attention"]}, id="gemma4 audio attention"),
    pytest.param(E2B, {"targets": SEVEN}, id="gemma4 seven names"),
    pytest.param(E2B, {"targets": SEVEN, "scope": ["language", "vision"]}, id="gemma4 seven names, two towers"),
    pytest.param(E2B, {"targets": ["q_proj", "v_proj"], "scope": "all"}, id="gemma4 two names, all towers"),
    pytest.param(E2B, {"targets": r".*layers\.0\..*q_proj"}, id="gemma4 regular expression"),
    pytest.param(E2B, {"targets": ["conv"], "scope": ["audio"]}, id="gemma4 convolutions"),
    pytest.param(MOE, {"targets": ["all-linear", "experts"]}, id="gemma4 moe with experts"),
    pytest.param(MOE, {"targets": ["router"]}, id="gemma4 moe router"),
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"targets": SEVEN}, id="llama seven names"),
    pytest.param("qwen3", {"targets": ["embeddings", "head"]}, id="qwen3 embeddings and head, untied"),
    pytest.param("mixtral", {"targets": ["all-linear", "experts"]}, id="mixtral with experts"),
    pytest.param("gpt_oss", {"targets": ["attention", "experts", "router"]}, id="gpt_oss with experts"),
    pytest.param("t5", {"targets": ["q_proj", "v_proj"]}, id="t5 by usual names"),
    pytest.param("bert", {"targets": ["attention"]}, id="bert attention"),
    pytest.param("whisper", {}, id="whisper"),
    pytest.param("llava", {"scope": ["vision", "projector"]}, id="llava vision and projector"),
    pytest.param("qwen3_vl", {"scope": "all"}, id="qwen3_vl"),
    pytest.param("mamba2", {}, id="mamba2"),
    pytest.param("moshi", {}, id="moshi"),
    pytest.param("deepseek_v3", {"targets": ["all-linear", "experts"]}, id="deepseek_v3: names PEFT rewrites"),
    pytest.param("deepseek_v3", {}, id="deepseek_v3 dense and shared MLPs"),
]


@pytest.mark.parametrize(("name", "request_"), REQUESTS)
def test_stock_peft_adapts_exactly_the_plan(
    twin_of: Callable[[str], nn.Module], name: str, request_: dict[str, Any]
) -> None:
    model = twin_of(name)
    plan = gk.plan(model, r=2, **request_)
    assert type(plan.peft_config) is LoraConfig
    adapted = get_peft_model(model, plan.peft_config)
    assert adapted_sites(adapted) == {a.target_path for a in plan.attached}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_trainable_parameters_are_counted_exactly(e2b: nn.Module, method: str) -> None:
    plan = gk.plan(e2b, scope="all", method=method, r=4)
    adapted = get_peft_model(e2b, plan.peft_config)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params
    assert plan.peft_config.use_dora is (method == "dora")
    assert plan.peft_config.use_rslora is (method == "rslora")


def test_every_site_is_attached_or_skipped_with_a_reason(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, scope=["language", "vision"])
    attached, skipped = {a.path for a in plan.attached}, {s.path for s in plan.skipped}
    assert attached
    assert skipped
    assert not attached & skipped
    assert attached | skipped == {site.path for site in plan.model}
    assert {s.cause for s in plan.skipped if s.site.tower == "audio"} == {LeftAlone.OUT_OF_SCOPE}
    assert all(a.reason for a in plan.attached)
    assert all(s.reason for s in plan.skipped)


def test_the_default_scope_is_what_every_batch_feeds(twin_of: Callable[[str], nn.Module]) -> None:
    assert {a.site.tower for a in gk.plan(twin_of(E2B)).attached} == {"language"}
    assert {a.site.tower for a in gk.plan(twin_of("whisper")).attached} == {"audio", "language"}


def test_all_linear_leaves_out_routers_and_heads(twin_of: Callable[[str], nn.Module]) -> None:
    plan = gk.plan(twin_of(MOE), scope="all")
    causes = {s.site.role: s.cause for s in plan.skipped}
    assert causes["router"] is LeftAlone.NOT_IN_ALL_LINEAR
    assert causes["expert"] is LeftAlone.STACKED_EXPERTS
    assert causes["lm_head"] is LeftAlone.TIED


def test_a_wrapper_s_name_means_its_inner_linear(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets=["q_proj"], scope=["vision", "audio"])
    assert plan.attached
    assert all(a.path.endswith("q_proj.linear") for a in plan.attached)


def test_usual_names_mean_the_same_tower_by_tower(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets=["o_proj"], scope=["language", "audio"])
    by_tower = {tower: [a.path for a in plan.attached if a.site.tower == tower] for tower in plan.scope}
    assert by_tower["language"]
    assert all(path.endswith("self_attn.o_proj") for path in by_tower["language"])
    assert by_tower["audio"]
    assert all(path.endswith("self_attn.post.linear") for path in by_tower["audio"])


def test_coverage_adds_up(twin_of: Callable[[str], nn.Module]) -> None:
    plan = gk.plan(twin_of(MOE), targets=["all-linear", "experts"])
    assert sum(row.sites for row in plan.coverage) == len(plan.model)
    assert sum(row.adapted for row in plan.coverage) == len(plan.attached)
    experts = next(row for row in plan.coverage if row.role == "expert")
    assert experts.share == 1.0


def test_the_plan_prints_and_serialises(e2b: nn.Module) -> None:
    import json

    plan = gk.plan(e2b, scope=["language", "vision"])
    fields = json.loads(json.dumps(plan.to_dict()))
    contract = {"peft_config", "attached", "skipped", "unmatched", "trainable_params", "memory"}
    assert contract <= fields.keys()
    assert {"path", "tower", "role", "via"} <= fields["attached"][0].keys()
    config = {k: v for k, v in fields["peft_config"].items() if k not in {"peft_type", "auto_mapping"}}
    assert LoraConfig(**config).r == 16
    table = str(plan)
    assert all(row.role in table for row in plan.coverage if row.tower in plan.scope)
    assert "lora r=16 lora_alpha=16 on all-linear in language, vision" in table


def test_unmatched_names_can_be_listed_instead(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets=["q_proj", "nonexistent"], allow_unmatched=True)
    assert plan.unmatched == ("nonexistent",)
    assert "nonexistent" in str(plan)


@pytest.mark.parametrize(
    ("name", "request_", "code", "said"),
    [
        pytest.param(E2B, {"targets": ["q_prj"]}, "target-unmatched", "q_proj", id="misspelt name"),
        pytest.param(E2B, {"targets": []}, "targets-empty", "all-linear", id="no targets"),
        pytest.param(
            E2B, {"targets": ["input_layernorm"]}, "target-not-adaptable", ".input_layernorm", id="only norms"
        ),
        pytest.param(E2B, {"targets": ["embed_tokens"]}, "target-not-adaptable", "lm_head", id="tied weight"),
        pytest.param(E2B, {"targets": ["post"]}, "target-unmatched", "audio", id="only out of scope"),
        pytest.param(E2B, {"targets": ["(q_proj"]}, "target-regex", "(q_proj", id="broken regular expression"),
        pytest.param(E2B, {"scope": ["visoin"]}, "scope-missing", "vision", id="misspelt tower"),
        pytest.param("llama", {"scope": ["audio"]}, "scope-missing", "language", id="no such tower"),
        pytest.param("gpt_oss", {"targets": ["gate_proj"]}, "target-unmatched", "experts", id="experts by name"),
        pytest.param("mamba2", {"targets": ["out_proj"]}, "target-not-adaptable", "", id="fused kernel"),
        pytest.param("llama", {"r": 0}, "rank-invalid", "r=16", id="rank 0"),
        pytest.param("llama", {"r": -4}, "rank-invalid", "r=16", id="negative rank"),
        pytest.param("llama", {"r": 2.5}, "rank-invalid", "r=16", id="fractional rank"),
        pytest.param("llama", {"alpha": 0}, "alpha-invalid", "alpha", id="alpha 0"),
        pytest.param("llama", {"dropout": 1.0}, "dropout-invalid", "dropout", id="dropout 1"),
        pytest.param("llama", {"method": "lorra"}, "method-unknown", "lora", id="misspelt method"),
        pytest.param("llama", {"use_dorra": True}, "option-unknown", "use_dora", id="misspelt option"),
        pytest.param("llama", {"rank": 8}, "option-unknown", "use r", id="rank is called r"),
        pytest.param("llama", {"options": {"use_dora": True}}, "option-unknown", "gk.plan", id="options in one"),
        pytest.param("llama", {"lora_alpha": 8}, "option-decided", "use alpha", id="alpha by PEFT's name"),
        pytest.param("llama", {"target_modules": ["x"]}, "option-decided", "use targets", id="decided option"),
        pytest.param(
            "llama", {"exclude_modules": ["x"]}, "option-decided", "scope", id="exclusion by another way"
        ),
        pytest.param(
            "llama",
            {"lora_bias": True, "init_lora_weights": "gaussian"},
            "option-invalid",
            "lora_bias",
            id="PEFT's own refusal",
        ),
        pytest.param(
            MOE, {"targets": ["experts"], "dropout": 0.1}, "expert-option", "dropout", id="dropout on experts"
        ),
        pytest.param(
            MOE, {"targets": ["experts"], "method": "dora"}, "expert-option", "DoRA", id="DoRA on experts"
        ),
    ],
)
def test_what_cannot_be_planned_says_why_and_what_to_do(
    twin_of: Callable[[str], nn.Module], name: str, request_: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(twin_of(name), **request_)
    assert caught.value.code == code
    assert said in str(caught.value)
    assert caught.value.help
