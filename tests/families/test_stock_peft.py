"""A random tenth of the proven families, or all, proven once more by PEFT and torch alone.

``GRAFTKIT_FAMILY_SEED`` chooses the tenth; the header of each run says which. ``make test-families`` has all.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tests.families import stock_peft
from tests.families.gaps import TABLE, read_gaps
from tests.families.turns import SEED, drawn
from torch import nn
from transformers import CONFIG_MAPPING

import graftkit as gk

PROVEN = set(CONFIG_MAPPING) - read_gaps(TABLE.read_text(encoding="utf-8")).keys()
TENTH = frozenset(drawn(PROVEN, os.environ[SEED]))
TYPES = [pytest.param(name, marks=() if name in TENTH else pytest.mark.families) for name in sorted(PROVEN)]


@pytest.mark.filterwarnings("ignore")  # architectures warn about many things; what is asserted is the outcome
@pytest.mark.parametrize("model_type", TYPES)
def test_stock_peft_proves_the_plan(model_type: str, tmp_path: Path) -> None:
    twin = gk.twin(model_type)
    plan = gk.plan(twin, targets=["all-linear", "experts"], r=2, allow_unmatched=True)
    plan.peft_config.save_pretrained(tmp_path)
    proof = stock_peft.prove(twin, gk.example_batch(twin), tmp_path)
    assert proof.problems == []
    for via, attached in (("target_modules", proof.modules), ("target_parameters", proof.parameters)):
        assert attached == {site.target_path for site in plan.attached if site.via == via}


def test_a_seed_repeats_its_tenth_and_others_are_others() -> None:
    tenths = [drawn(PROVEN, str(seed)) for seed in range(60)]
    assert tenths[7] == drawn(sorted(PROVEN, reverse=True), "7")
    assert {len(tenth) for tenth in tenths} == {len(PROVEN) // 10}
    assert len(set().union(*tenths)) > 0.95 * len(PROVEN)


# ---- the proof itself can fail ----


class Shim(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Toy(nn.Module):
    def __init__(self, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), second, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        return {"logits": hidden, "pooled": self.second(hidden)}


class Masked(Toy):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().forward(x)
        hidden = torch.arange(8) < 3
        return {name: value.masked_fill(hidden, -torch.inf) for name, value in outputs.items()}


def problems(model: nn.Module, targets: list[str], folder: Path) -> str:
    LoraConfig(r=2, target_modules=targets).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return " ".join(stock_peft.prove(model, {"x": torch.randn(4, 8)}, folder).problems)


@pytest.mark.parametrize(
    ("model", "targets", "problem"),
    [
        pytest.param(Toy(nn.Linear(8, 8)), ["first", "second"], "", id="a good one"),
        pytest.param(Masked(nn.Linear(8, 8)), ["first", "second"], "", id="a good one with masked outputs"),
        pytest.param(Masked(Shim(8, 8)), ["first", "second"], "merged and adapted", id="a merge beside masks"),
        pytest.param(Toy(nn.Linear(8, 8)), ["first", "unused"], "no gradient", id="not reached"),
        pytest.param(Toy(Shim(8, 8)), ["first", "second"], "merged and adapted", id="a second output's merge"),
    ],
)
def test_what_it_finds(model: nn.Module, targets: list[str], problem: str, tmp_path: Path) -> None:
    found = problems(model, targets, tmp_path)
    assert bool(found) == bool(problem)
    assert problem in found
