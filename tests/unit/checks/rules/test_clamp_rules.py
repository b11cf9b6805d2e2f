"""The clamp rules: bounds that were lost, and an adapter that ends on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.unit.checks.live_adapters import adapted
from tests.unit.checks.observed import seen
from torch import nn
from transformers import AutoModelForImageTextToText

import graftkit as gk
from graftkit.checks.probes.clamps import clamped_shares
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.recipes.settings import CheckSettings

ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
BOUNDS = ("input_min", "input_max", "output_min", "output_max")

Twins = Callable[[str], nn.Module]


@pytest.fixture
def saved(e2b: nn.Module, tmp_path: Path) -> Path:
    """The twin of Gemma 4 E2B, with its finite bounds, as a checkpoint."""
    e2b.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# ---- GK305: bounds ----


@pytest.mark.rule_fails("GK305")
def test_gk305_garbage_from_to_empty(e2b: nn.Module, saved: Path) -> None:
    with torch.device("meta"):
        empty = type(e2b)(e2b.config)
    found = seen("GK305", model=adapted(empty.to_empty(device="cpu")), checkpoint=saved)
    assert found.severity is ERROR
    assert found.evidence["bounds"] == 136


@pytest.mark.rule_fails("GK305")
def test_gk305_bounds_that_the_checkpoint_has_and_the_model_has_not(
    e2b: nn.Module, saved: Path, tmp_path: Path
) -> None:
    """As after loading a copy of the weights that was saved without the wrappers."""
    stripped = tmp_path / "stripped"
    shutil.copytree(saved, stripped)
    weights = load_file(saved / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(BOUNDS)}
    assert len(weights) - len(kept) == 136
    save_file(kept, stripped / "model.safetensors", metadata={"format": "pt"})
    model = adapted(AutoModelForImageTextToText.from_pretrained(stripped))
    lost = seen("GK305", model=model, checkpoint=saved)
    assert (lost.severity, lost.evidence["lost"]) == (ERROR, 136)
    assert "inf" in lost.message
    missing = seen("GK305", model=model, checkpoint=stripped)
    assert (missing.severity, missing.evidence["missing from the checkpoint"]) == (ERROR, 136)


@pytest.mark.rule_fails("GK305")
def test_gk305_one_bound_off_names_it(e2b: nn.Module, saved: Path) -> None:
    model = adapted(e2b)
    wrapper = bounded_wrappers(e2b)[3]
    wrapper.bounds["input_max"].mul_(1.1)
    found = seen("GK305", model=model, checkpoint=saved)
    assert (found.severity, found.where) == (ERROR, f"{wrapper.path}.input_max")


@pytest.mark.rule_fails("GK305")
def test_gk305_rounding_is_a_note(saved: Path) -> None:
    model = adapted(AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16))
    found = seen("GK305", model=model, checkpoint=saved)
    assert found.severity is INFO
    assert 0 < found.evidence["worst_relative_error"] <= 2**-8
    strict = CheckSettings(rules={"GK305": {"rounding": 1e-6}})
    assert seen("GK305", model=model, checkpoint=saved, settings=strict).severity is ERROR


@pytest.mark.rule_passes("GK305")
@pytest.mark.parametrize("scope", [["language"], ["language", "vision", "audio"]], ids=["beside", "inside"])
def test_gk305_passes_on_what_from_pretrained_loads(saved: Path, scope: list[str]) -> None:
    model = adapted(AutoModelForImageTextToText.from_pretrained(saved), scope=scope)
    found = seen("GK305", model=model, checkpoint=saved)
    assert (found.severity, found.evidence["bounds"]) == (OK, 136)


@pytest.mark.rule_passes("GK305")
def test_gk305_passes_without_bounds(twin_of: Twins, tmp_path: Path) -> None:
    assert seen("GK305", model=adapted(twin_of("llama")), checkpoint=tmp_path).severity is OK


# ---- GK306: saturation ----


def trained(model: PeftModel, batch: dict[str, Any], rate: float) -> None:
    """A few steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.rule_fails("GK306")
def test_gk306_an_adapter_that_ends_on_the_bounds(e2b: nn.Module) -> None:
    model, batch = adapted(e2b, scope=["vision"]), gk.example_batch(e2b)
    trained(model, batch, rate=0.2)  # a thousand times too high
    found = seen("GK306", model=model, batch=batch)
    assert found.severity is WARNING
    assert found.evidence["worst_increase"] > 0.2
    assert found.evidence["share_adapted"] > found.evidence["share_base"]
    assert "vision_tower" in (found.where or "")
    lenient = CheckSettings(rules={"GK306": {"increase": 1.0}})
    assert seen("GK306", model=model, batch=batch, settings=lenient).severity is OK


def test_gk306_unknown_on_a_fresh_adapter(e2b: nn.Module) -> None:
    """It moves nothing, so that no limit could make the check fail: that says nothing of what it will learn."""
    model, batch = adapted(e2b, scope=["language", "vision", "audio"]), gk.example_batch(e2b)
    strictest = CheckSettings(rules={"GK306": {"increase": 0.0}})
    found = seen("GK306", model=model, batch=batch, settings=strictest)
    assert found.severity is UNKNOWN
    with model.disable_adapter():
        shares = clamped_shares(model, batch)
    assert clamped_shares(model, batch) == shares
    assert found.evidence["share_base"] == pytest.approx(sum(shares.values()) / len(shares))
    assert 0.03 < found.evidence["share_base"] < 0.15


@pytest.mark.rule_passes("GK306")
def test_gk306_passes_on_a_little_training(e2b: nn.Module) -> None:
    model, batch = adapted(e2b, scope=["vision"]), gk.example_batch(e2b)
    trained(model, batch, rate=1e-4)
    found = seen("GK306", model=model, batch=batch)
    assert found.severity is OK
    assert found.evidence["worst_increase"] < found.evidence["allowed_increase"]


@pytest.mark.rule_passes("GK306")
@pytest.mark.parametrize("name", ["llama", "google/gemma-4-31B-it", "mixtral"])
def test_gk306_passes_without_bounds(twin_of: Twins, name: str) -> None:
    model = twin_of(name)
    assert seen("GK306", model=adapted(model), batch=gk.example_batch(model)).severity is OK


@pytest.mark.parametrize(
    ("scope", "verdict"), [(["language"], OK), (["vision"], UNKNOWN)], ids=["beside", "inside"]
)
def test_gk306_on_text_alone(e2b: nn.Module, scope: list[str], verdict: gk.Severity) -> None:
    batch = gk.example_batch(e2b, modalities=["text"])
    assert seen("GK306", model=adapted(e2b, scope=scope), batch=batch).severity is verdict


def test_gk306_unknown_where_activations_are_not_finite(e2b: nn.Module) -> None:
    model = adapted(e2b, scope=["vision"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("nan"))
    assert seen("GK306", model=model, batch=gk.example_batch(e2b)).severity is UNKNOWN


def test_what_is_clamped_is_counted() -> None:
    """A wrapper that clamps at 0.5: what lies beyond it, and nothing else, is clamped."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)
            self.bound = nn.Buffer(torch.tensor(0.5))
            self.linear.weight.data = torch.eye(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).clamp(-self.bound, self.bound)

    inputs = torch.tensor([[0.1, 0.4, 0.6, -0.7]])
    shares = clamped_shares(nn.Sequential(Clamped()), {"input": inputs})
    assert shares == {"0": 2 / 8}
