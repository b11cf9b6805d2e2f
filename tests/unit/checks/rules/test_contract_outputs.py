"""Outputs are compared as they are: all of them, under one seed, and where rounding decides, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.unit.checks.observed import checked, finding
from torch import nn

import graftkit as gk

ERROR, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.OK, gk.Severity.UNKNOWN
COMPARING = ("GK115", "GK508", "GK601")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Shim(nn.Linear):
    """A clamp around a linear that PEFT takes for the linear: the adapter's update escapes the clamp."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.3, 0.3)


class TwoOutputs(nn.Module):
    """A large first output that is right, and a second one, a thousandth of its size, from another linear."""

    def __init__(self, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), second

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"logits": self.first(x), "extra": [(self.second(x) / 1000,)]}


class Sampling(nn.Module):
    """Reads only some of its inputs, chosen by chance in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x[torch.randperm(len(x))[:2]])


class Vocoder(nn.Module):
    """Repeats each token for as many frames as a projection says, rounded up: at a whole number by a hair.

    ``hair`` is what the last digit of a sum in another order is to a real model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lengths = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = self.first(x)
        hair = torch.finfo(x.dtype).eps * 8 * self.merged()
        lengths = (self.lengths(x).clamp(2, 2) + hair - 1e-12).ceil().long().flatten()
        return frames.repeat_interleave(lengths, dim=0)

    def merged(self) -> bool:
        return bool(getattr(self.first, "merged", False))


def adapted(model: nn.Module, targets: list[str]) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets))


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}


def test_all_outputs_are_compared() -> None:
    report = checked(COMPARING, model=adapted(TwoOutputs(nn.Linear(8, 8)), ["first", "second"]), batch=batch())
    assert {found.severity for found in report} == {OK}, str(report)
    assert {found.evidence["outputs"] for found in report} == {2}


@pytest.mark.rule_fails("GK601")
def test_gk601_a_second_output_that_the_merge_breaks() -> None:
    model = adapted(TwoOutputs(Shim(8, 8)), ["first", "second"])
    with torch.no_grad():
        model.base_model.model.second.base_layer.weight.mul_(20)
    found = finding(checked(["GK601"], model=model, batch=batch()), "GK601")
    assert found.severity is ERROR
    assert found.evidence["worst_output"] == "extra.0.0"
    assert found.evidence["difference_in_float64"] > found.evidence["tolerance"], "and float64 does not excuse it"


@pytest.mark.rule_fails("GK115")
def test_gk115_a_second_output_that_a_fresh_adapter_changes() -> None:
    class Picky(nn.Linear):
        pass

    class ByClass(TwoOutputs):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            found = super().forward(x)
            return found if isinstance(self.second, Picky) else {**found, "extra": [(found["extra"][0][0] * 2,)]}

    found = finding(checked(["GK115"], model=adapted(ByClass(Picky(8, 8)), ["second"]), batch=batch()), "GK115")
    assert found.severity is ERROR
    assert found.evidence["worst_output"] == "extra.0.0"


@pytest.mark.rule_passes(*COMPARING)
def test_gk115_gk508_gk601_a_model_that_samples_in_its_forward() -> None:
    report = checked(COMPARING, model=adapted(Sampling(), ["first"]), batch=batch())
    assert {found.severity for found in report} == {OK}, str(report)


@pytest.mark.rule_passes("GK601")
def test_gk601_a_length_that_rounding_decides() -> None:
    model = adapted(Vocoder(), ["first"]).float()
    assert len(model(**batch())) == 8
    model.merge_adapter()
    assert len(model(**batch())) == 12
    model.unmerge_adapter()
    found = finding(checked(["GK601"], model=model, batch=batch()), "GK601")
    assert found.severity is OK, found.message
    assert found.evidence["difference"] == float("inf")
    assert found.evidence["difference_in_float64"] < 1e-9


@pytest.mark.rule_fails("GK601")
def test_gk601_a_length_that_the_merge_changes() -> None:
    class Longer(Vocoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[: 4 if self.merged() else 6]

    found = finding(checked(["GK601"], model=adapted(Longer(), ["first"]), batch=batch()), "GK601")
    assert found.severity is ERROR


@pytest.mark.rule_fails("GK601")
def test_gk601_a_merge_in_too_low_a_precision_is_not_excused_by_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    exact = Linear.get_delta_weight

    def rounded(self: Any, adapter: str) -> torch.Tensor:
        update = exact(self, adapter)
        return update.half().float() if update.dtype == torch.float32 else update

    monkeypatch.setattr(Linear, "get_delta_weight", rounded)
    model = adapted(Sampling(), ["first"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=2.0)
    found = finding(checked(["GK601"], model=model, batch=batch()), "GK601")
    assert found.severity is ERROR
    assert found.evidence["difference_in_float64"] < 1e-9
    assert found.evidence["weights_difference"] > 1e-5
