"""Each contract check holds on a good adapter and fails on a really broken one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.errors import VerifyError

ERROR, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.OK, gk.Severity.UNKNOWN


def finding(report: gk.Report, code: str) -> gk.Finding:
    return next(f for f in report if f.code == code)


def verdicts(report: gk.Report) -> dict[str, gk.Severity]:
    return {f.code: f.severity for f in report}


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        pytest.param("google/gemma-4-E2B-it", "all", id="gemma4 E2B, all towers"),
        pytest.param("google/gemma-4-31B-it", ["language", "vision"], id="gemma4 31B"),
        pytest.param("llama", None, id="llama"),
        pytest.param("t5", None, id="t5"),
        pytest.param("whisper", None, id="whisper"),
        pytest.param("mamba2", None, id="mamba2"),
        pytest.param("moshi", None, id="moshi"),
    ],
)
def test_a_planned_adapter_keeps_its_contract(
    twin_of: Callable[[str], nn.Module], name: str, scope: str | list[str] | None
) -> None:
    model = twin_of(name)
    adapted = gk.attach(model, gk.plan(model, scope=scope, r=4))
    report = gk.verify(adapted, gk.example_batch(adapted.get_base_model()))
    assert set(verdicts(report).values()) == {OK}, str(report)
    assert report.proven


def test_experts_keep_the_contract_too(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("google/gemma-4-26B-A4B-it")
    adapted = gk.attach(model, gk.plan(model, targets=["all-linear", "experts"], r=2))
    report = gk.verify(adapted, gk.example_batch(adapted.get_base_model()))
    assert report.proven, str(report)


def test_the_twin_s_bounds_bite(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, scope=["language", "vision", "audio"], r=4))
    seen = finding(gk.verify(adapted, gk.example_batch(e2b)), "GK601").evidence
    assert seen["bounded_wrappers"] > 0
    assert seen["bounded_wrappers_reached"] == seen["bounded_wrappers"]
    assert seen["adapter_effect"] > 10 * seen["tolerance"]


def test_verify_leaves_no_trace(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, r=2))
    adapted.train()
    batch = gk.example_batch(e2b)
    adapted(**batch).loss.backward()
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    gradients = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    gk.verify(adapted, batch)
    assert all(torch.equal(v, state[k]) for k, v in adapted.state_dict().items())
    assert gradients
    assert all(torch.equal(dict(adapted.named_parameters())[n].grad, g) for n, g in gradients.items())
    assert all(module.training for module in adapted.modules())


# ---- broken adapters, each in the way people meet it ----


class Clamped(nn.Module):
    """A wrapper: one linear, clamped on its way out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.bound = nn.Buffer(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-self.bound, self.bound)


class ClampedShim(nn.Linear):
    """The workaround that makes a wrapper look like a linear: the adapter's delta escapes the clamp."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.3, 0.3)


class PickyWrapper(nn.Module):
    """A module that treats its child by class, so that PEFT's layer changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y.clamp(-0.1, 0.1) if type(self.linear) is nn.Linear else y


class Toy(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.part = part
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.first(x))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def adapted_toy(part: nn.Module, targets: list[str], **options: Any) -> PeftModel:
    return get_peft_model(Toy(part), LoraConfig(r=4, target_modules=targets, **options))


def test_a_good_toy_passes(batch: dict[str, torch.Tensor]) -> None:
    report = gk.verify(adapted_toy(Clamped(), ["first", "part.linear"]), batch)
    assert report.proven, str(report)


def test_gk601_a_delta_that_escapes_the_clamp(batch: dict[str, torch.Tensor]) -> None:
    report = gk.verify(adapted_toy(ClampedShim(8, 8, bias=False), ["part"]), batch)
    assert finding(report, "GK601").severity is ERROR


def test_gk601_bounds_that_nothing_reaches_are_not_called_proven(batch: dict[str, torch.Tensor]) -> None:
    part = Clamped()
    part.bound.fill_(1e6)
    assert finding(gk.verify(adapted_toy(part, ["part.linear"]), batch), "GK601").severity is UNKNOWN


def test_gk203_an_adapter_that_nothing_feeds(batch: dict[str, torch.Tensor]) -> None:
    seen = finding(gk.verify(adapted_toy(Clamped(), ["first", "unused"]), batch), "GK203")
    assert seen.severity is ERROR
    assert seen.evidence["dead"] == 2
    assert "unused" in (seen.where or "")


def test_gk203_a_tower_the_batch_leaves_unfed(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, scope=["language", "vision"], r=2))
    text_only = gk.example_batch(e2b, modalities=["text"])
    seen = finding(gk.verify(adapted, text_only), "GK203")
    assert seen.severity is ERROR
    assert "vision_tower" in (seen.where or "")


def test_gk203_gradients_that_are_not_finite(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"])
    seen = finding(gk.verify(adapted, {"x": batch["x"] * float("inf")}), "GK203")
    assert seen.severity is ERROR
    assert seen.evidence["not_finite"] > 0


def test_gk115_a_module_that_changes_with_its_child_s_class(batch: dict[str, torch.Tensor]) -> None:
    assert finding(gk.verify(adapted_toy(PickyWrapper(), ["part.linear"]), batch), "GK115").severity is ERROR


@pytest.mark.parametrize(
    "initializer", [pytest.param(False, id="no promise"), pytest.param("pissa", id="moves the base")]
)
def test_gk115_is_unknown_where_the_initializer_makes_no_promise(
    batch: dict[str, torch.Tensor], initializer: bool | str
) -> None:
    adapted = adapted_toy(Clamped(), ["first"], init_lora_weights=initializer)
    assert finding(gk.verify(adapted, batch), "GK115").severity is UNKNOWN


def test_gk115_is_unknown_after_training(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert finding(gk.verify(adapted, batch), "GK115").severity is UNKNOWN


def test_gk508_a_saved_config_that_stock_peft_refuses(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, targets=["q_proj"], scope=["vision"], r=2))
    # What a redirecting tool leaves in adapter_config.json: the wrapper's name instead of the inner path.
    adapted.peft_config["default"].target_modules = {"q_proj"}
    seen = finding(gk.verify(adapted, gk.example_batch(e2b)), "GK508")
    assert seen.severity is ERROR
    assert "not supported" in seen.message


def test_gk508_tensors_that_the_reload_drops(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first", "part.linear"])
    adapted.peft_config["default"].target_modules = {"first"}
    assert finding(gk.verify(adapted, batch), "GK508").severity is ERROR


def test_gk607_a_delta_that_swamps_the_base(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"]).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=30)
    seen = finding(gk.verify(adapted, {"x": batch["x"].to(torch.bfloat16)}), "GK607")
    assert seen.severity is ERROR
    assert "outweighs" in seen.message


def test_a_method_that_cannot_merge_is_unknown(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"], lora_bias=False)
    layer = adapted.base_model.model.first
    layer.merge = _refuse_to_merge
    report = gk.verify(adapted, batch)
    assert finding(report, "GK601").severity is UNKNOWN
    assert finding(report, "GK607").severity is UNKNOWN
    assert not report.proven


def _refuse_to_merge(*_args: Any, **_kwargs: Any) -> None:
    raise NotImplementedError("this layer cannot be merged")


def test_a_crash_in_one_check_does_not_stop_the_others(batch: dict[str, torch.Tensor]) -> None:
    report = gk.verify(adapted_toy(Clamped(), ["first"]), {"not_an_argument": batch["x"]})
    assert len(report) == 5
    assert {f.severity for f in report if f.code != "GK607"} == {UNKNOWN}
    assert "TypeError" in finding(report, "GK203").message


def test_a_model_without_adapter_is_an_error(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(VerifyError) as caught:
        gk.verify(Toy(Clamped()), batch)
    assert caught.value.code == "no-adapter"


def test_a_trained_adapter_is_checked_as_it_is(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first", "part.linear"])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(**batch).pow(2).mean().backward()
        optimizer.step()
    before = copy.deepcopy(adapted.state_dict())
    report = gk.verify(adapted, batch)
    assert {f.severity for f in report if f.code != "GK115"} == {OK}, str(report)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
