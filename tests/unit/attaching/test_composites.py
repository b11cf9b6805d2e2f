"""A module composed of linears, named in the targets, means each of them: in a plan, and under ``enable()``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites

WIDTH = 8


class NormLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class GatedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x)) * self.value(x)


class NormGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.core = GatedLinear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = GatedLinear()
        self.k_proj = NormLinear()
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) * self.k_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.up_proj = NormGated()
        self.down_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.down_proj(self.up_proj(x))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def everywhere(*names: str) -> set[str]:
    return {f"layers.{n}.{name}" for n in range(2) for name in names}


GATED = ("self_attn.q_proj.gate", "self_attn.q_proj.value")
UP = ("up_proj.core.gate", "up_proj.core.value")
ALL_OF_IT = [
    pytest.param(["q_proj"], everywhere(*GATED), id="gate and value"),
    pytest.param(["k_proj"], everywhere("self_attn.k_proj.linear"), id="norm and linear"),
    pytest.param(["up_proj"], everywhere(*UP), id="nested"),
    pytest.param(["q_proj", "o_proj"], everywhere(*GATED, "self_attn.o_proj"), id="beside a plain linear"),
    pytest.param(["q_proj", "value"], everywhere(*GATED, UP[1]), id="named twice"),
    pytest.param(["layers.1.self_attn.q_proj"], {f"layers.1.{name}" for name in GATED}, id="full path"),
    pytest.param(r".*\.(q_proj|o_proj)", everywhere(*GATED, "self_attn.o_proj"), id="regular expression"),
]


@pytest.mark.parametrize(("targets", "sites"), ALL_OF_IT)
def test_a_plan_adapts_each_linear_inside(targets: Any, sites: set[str]) -> None:
    plan = gk.plan(toy(), targets=targets, r=2)
    assert {a.path for a in plan.attached} == sites
    assert adapted_sites(get_peft_model(toy(), plan.peft_config)) == sites


@pytest.mark.parametrize(("targets", "sites"), ALL_OF_IT)
def test_stock_peft_refuses_and_takes_it_under_enable(targets: Any, sites: set[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)Target module .*is not supported"):
        get_peft_model(toy(), LoraConfig(r=2, target_modules=targets))
    with gk.enable():
        adapted = get_peft_model(toy(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert adapted_sites(adapted) == sites
    adapted.save_pretrained(tmp_path)
    x = torch.randn(3, WIDTH)
    # What is saved is stock.
    torch.testing.assert_close(PeftModel.from_pretrained(toy(), tmp_path).eval()(x), adapted(x), rtol=0, atol=0)
    torch.testing.assert_close(adapted.merge_and_unload()(x), PeftModel.from_pretrained(toy(), tmp_path).eval()(x))


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=["q_proj"]),
    ],
)
def test_other_tuners_follow(config: Any) -> None:
    with gk.enable():
        adapted = get_peft_model(toy(), config)
    assert adapted_sites(adapted) == everywhere(*GATED)


def test_what_is_done_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with gk.enable(), caplog.at_level(logging.WARNING, "graftkit"):
        get_peft_model(toy(), LoraConfig(r=2, target_modules=["o_proj"]))
        assert not caplog.records
        get_peft_model(toy(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(caplog.records) == 1
    assert "layers.0.self_attn.q_proj" in caplog.text


def test_the_plan_says_it_too() -> None:
    plan = gk.plan(toy(), targets=["q_proj"])
    assert all("GatedLinear" in a.reason for a in plan.attached)


def test_ranks_and_exclusions_follow() -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 4}, exclude_modules=["gate"]
    )
    with gk.enable():
        adapted = get_peft_model(toy(), config)
    assert adapted_sites(adapted) == everywhere("self_attn.q_proj.value", "self_attn.o_proj")
    ranks = {n.rpartition(".")[2]: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {"value": 4, "o_proj": 2}
    plan = gk.plan(toy(), targets=["q_proj", "o_proj"], r=2, rank_pattern={"q_proj": 4})
    ranks = {
        n.rpartition(".")[2]: m.r["default"]
        for n, m in get_peft_model(toy(), plan.peft_config).named_modules()
        if hasattr(m, "lora_A")
    }
    assert ranks == {"gate": 4, "value": 4, "o_proj": 2}


def test_a_pattern_that_leaves_a_linear_out_is_not_widened() -> None:
    pattern = r".*self_attn.*(?<!gate)(?<!norm)"
    with gk.enable(), pytest.raises(ValueError, match=r"(?s)Target module .*is not supported") as caught:
        get_peft_model(toy(), LoraConfig(target_modules=pattern))
    assert "gk.plan" in "".join(caught.value.__notes__)
    named = {a.path for a in gk.plan(toy(), targets=pattern).attached}
    assert named == everywhere("self_attn.q_proj.value", "self_attn.k_proj.linear", "self_attn.o_proj")


def test_a_pattern_that_matches_all_but_some_is_not_widened() -> None:
    everything_else = {s.path for s in gk.survey(toy()) if "q_proj" not in s.path and "up_proj.core" not in s.path}
    named = gk.plan(toy(), targets=r"(?!.*(q_proj\.|core\.)).*").attached
    assert {a.path for a in named} == everything_else


def test_a_second_adapter_and_a_repeat_reach_the_same() -> None:
    with gk.enable():
        adapted = get_peft_model(toy(), LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    assert adapted_sites(adapted, "second") == everywhere(*GATED, "self_attn.k_proj.linear")


def test_roles_come_from_the_composites_name() -> None:
    roles = {site.path.partition(".")[2].partition(".")[2]: site.role for site in gk.survey(toy())}
    assert {roles[name] for name in GATED} == {"attention.q"}
    assert roles["self_attn.k_proj.linear"] == "attention.k"
    assert {roles[name] for name in UP} == {"mlp.up"}
    assert "router" not in roles.values()
