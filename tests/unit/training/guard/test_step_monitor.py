"""What measured steps show: norms, updates, untrained tensors, clamped activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graftkit as gk
from graftkit.checks.probes.clamps import clamped_shares
from graftkit.modeling.bounded_wrappers import BoundedWrapper
from graftkit.training.guard.saturation import Saturation
from graftkit.training.guard.step_monitor import StepMonitor, StepStats, curves_of
from graftkit.training.guard.tensor_stats import TensorActivity, TensorStats, changes_since, nonfinite, sample

TwinOf = Callable[[str], nn.Module]


@pytest.fixture
def adapted(twin_of: TwinOf) -> nn.Module:
    model = twin_of("qwen3")
    return gk.attach(model, gk.plan(model, targets="attention", r=2))


def test_norms_are_those_of_each_tensor_in_float32(adapted: nn.Module) -> None:
    tensors = TensorStats.of(adapted)
    large = {name: torch.full_like(p, 60_000.0, dtype=torch.float16) for name, p in tensors.named.items()}
    norms = tensors.norms(large)
    assert norms == pytest.approx({name: float(t.float().norm()) for name, t in large.items()})
    assert nonfinite(norms) == ()
    assert tensors.by_tower(norms)["language"] == pytest.approx(sum(n * n for n in norms.values()) ** 0.5)


def test_a_tensor_that_is_not_finite_is_named(adapted: nn.Module) -> None:
    monitor = StepMonitor(adapted)
    name = list(monitor.tensors.named)[3]
    for parameter in monitor.tensors.named.values():
        parameter.grad = torch.zeros_like(parameter)
    monitor.tensors.named[name].grad[0, 0] = float("inf")
    monitor.begin()
    assert monitor.gradients() == (name,)


def test_an_update_is_measured_against_the_weights(adapted: nn.Module) -> None:
    monitor = StepMonitor(adapted)
    monitor.begin()
    monitor.gradients()
    with torch.no_grad():
        for parameter in monitor.tensors.named.values():
            parameter.mul_(1.01)
    assert monitor.end(1, learns=True) == ()
    assert monitor.steps[0].update["language"] == pytest.approx(0.01 / 1.01, rel=1e-4)


def test_the_change_of_a_large_tensor_is_estimated_from_a_sample() -> None:
    wide = nn.Parameter(torch.randn(50, 1001))
    tensors = TensorStats({"wide": wide}, {"wide": "language"}, sharded=False)
    before, change = sample(tensors.named), torch.randn_like(wide) * 0.1
    assert before["wide"].numel() < wide.numel() / 10
    with torch.no_grad():
        wide.add_(change)
    norms = tensors.norms(changes_since(before, tensors.named))
    assert norms["wide"] == pytest.approx(float(change.norm()), rel=0.05)


def activity(*steps: tuple[dict[str, float], dict[str, float], dict[str, float]]) -> TensorActivity:
    made = TensorActivity(("a", "b"), frozenset({"b"}))
    for gradients, weights, changes in steps:
        made.record(gradients, weights, changes)
    return made


@pytest.mark.parametrize(
    ("step", "untrained", "nothing_changes"),
    [
        pytest.param(({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 0.1, "b": 0.1}), (), False, id="trained"),
        pytest.param(({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"b": 0.1}), ("a",), False, id="no gradient"),
        pytest.param(({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 0.1}), ("b",), False, id="still zero"),
        pytest.param(({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0}), ("b",), True, id="nothing changes"),
        pytest.param(({}, {"a": 1.0, "b": 0.5}, {"a": 0.1, "b": 0.1}), (), False, id="gradients not seen"),
    ],
)
def test_untrained_tensors(
    step: tuple[dict[str, float], dict[str, float], dict[str, float]],
    untrained: tuple[str, ...],
    nothing_changes: bool,
) -> None:
    recorded = activity(step)
    assert (recorded.untrained, recorded.nothing_changes) == (untrained, nothing_changes)


def test_one_step_with_a_gradient_is_enough() -> None:
    still = ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"b": 0.1})
    assert activity(still, ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 0.1}), still).untrained == ()


class Clamp(nn.Module):
    """A linear with bounds around it."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.linear.weight)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(self.low, self.high)


@given(low=st.floats(-2, -0.1), high=st.floats(0.1, 2), seed=st.integers(0, 99))
def test_the_share_of_clamped_activations_is_exact_where_all_are_sampled(
    low: float, high: float, seed: int
) -> None:
    wrapper = Clamp(low, high)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    seen = Saturation([BoundedWrapper("w", wrapper, wrapper.linear)])
    seen.begin()
    wrapper(x)
    outside = ((x < low) | (x > high)).float().mean().item()
    assert seen.end() == {"w": pytest.approx(outside / 2)}, "inputs count too, and none of them is clamped"
    assert seen.end() == {}


def test_a_sample_gives_the_share_that_counting_all_gives(twin_of: TwinOf) -> None:
    model = twin_of("google/gemma-4-E2B-it")
    batch = gk.example_batch(model)
    adapted = gk.attach(model, gk.plan(model, targets="attention", scope=["language", "vision"], r=2))
    monitor = StepMonitor(adapted)
    adapted.eval()
    monitor.begin()
    adapted(**batch).loss.backward()
    monitor.gradients()
    monitor.end(1, learns=True)
    counted = clamped_shares(adapted, batch)
    towers = monitor.steps[0].saturation
    for tower in ("vision", "audio"):
        of_tower = [share for path, share in counted.items() if f"{tower}_tower" in path]
        assert towers[tower] == pytest.approx(sum(of_tower) / len(of_tower), abs=0.01)
    assert not any(module._forward_hooks for module in adapted.modules())


def test_what_is_not_finite_is_left_out_of_the_curves() -> None:
    steps = [
        StepStats(1, {"language": 2.0}, {"language": float("nan")}),
        StepStats(2, {"language": float("inf")}, {}),
    ]
    assert curves_of(steps) == {"Gradient norm": ({"label": "language", "points": ((1, 2.0),)},)}
