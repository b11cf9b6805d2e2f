"""Each contract check holds on a good adapter and fails on a really broken one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.unit.checks.observed import by_code, finding
from torch import nn

import graftkit as gk
from graftkit.errors import VerifyError

ERROR, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.OK, gk.Severity.UNKNOWN
CONTRACT = {"GK115", "GK203", "GK508", "GK601", "GK607"}


def verdicts(report: gk.Report) -> dict[str, gk.Severity]:
    return {code: found.severity for code, found in by_code(report).items()}


@pytest.mark.rule_passes("GK115", "GK203", "GK508", "GK601", "GK607")
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
def test_gk115_gk203_gk508_gk601_gk607_passes_on_a_planned_adapter(
    twin_of: Callable[[str], nn.Module], name: str, scope: str | list[str] | None
) -> None:
    model = twin_of(name)
    adapted = gk.attach(model, gk.plan(model, scope=scope, r=4))
    report = gk.verify(adapted, gk.example_batch(adapted.get_base_model()))
    found = {code: verdict for code, verdict in verdicts(report).items() if code in CONTRACT}
    assert found == dict.fromkeys(CONTRACT, OK), str(report)


def test_experts_keep_the_contract_too(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("google/gemma-4-26B-A4B-it")
    adapted = gk.attach(model, gk.plan(model, targets=["all-linear", "experts"], r=2))
    report = gk.verify(adapted, gk.example_batch(adapted.get_base_model()))
    assert report.proven, str(report)


def test_the_twin_s_bounds_bite(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, scope=["language", "vision", "audio"], r=4))
    found = finding(gk.verify(adapted, gk.example_batch(e2b)), "GK601").evidence
    assert found["bounded_wrappers"] > 0
    assert found["bounded_wrappers_reached"] == found["bounded_wrappers"]
    assert found["adapter_effect"] > 10 * found["tolerance"]


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
    # What training will do to the clamps, a fresh adapter cannot tell.
    assert {code: verdict for code, verdict in verdicts(report).items() if verdict is not OK} == {"GK306": UNKNOWN}


@pytest.mark.rule_fails("GK601")
def test_gk601_a_delta_that_escapes_the_clamp(batch: dict[str, torch.Tensor]) -> None:
    report = gk.verify(adapted_toy(ClampedShim(8, 8, bias=False), ["part"]), batch)
    assert finding(report, "GK601").severity is ERROR


@pytest.mark.rule_fails("GK601")
def test_gk601_fresh_rows_of_one_of_two_modules_that_share_a_weight(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("gemma2")
    batch = gk.example_batch(model)
    tokens = batch["input_ids"].flatten().tolist()
    adapted = gk.attach(model, gk.plan(model, r=2, trainable_token_indices={"lm_head": sorted({*tokens})}))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    assert finding(gk.verify(adapted, batch), "GK601").severity is ERROR
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.rule_passes("GK601")
def test_gk601_passes_on_rows_that_peft_shares(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("gemma2")
    adapted = gk.attach(model, gk.plan(model, r=2, trainable_token_indices=[1, 2]))
    assert finding(gk.verify(adapted, gk.example_batch(adapted.get_base_model())), "GK601").severity is OK


def test_gk601_bounds_that_nothing_reaches_are_not_called_proven(batch: dict[str, torch.Tensor]) -> None:
    part = Clamped()
    part.bound.fill_(1e6)
    assert finding(gk.verify(adapted_toy(part, ["part.linear"]), batch), "GK601").severity is UNKNOWN


@pytest.mark.rule_fails("GK203")
def test_gk203_an_adapter_that_nothing_feeds(batch: dict[str, torch.Tensor]) -> None:
    found = finding(gk.verify(adapted_toy(Clamped(), ["first", "unused"]), batch), "GK203")
    assert found.severity is ERROR
    assert found.evidence["dead"] == 2
    assert "unused" in (found.where or "")


class InTraining(nn.Module):
    """A layer that only training runs, after one that both modes do."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.more = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.norm(self.always(x))
        return self.more(states) if self.training else states


def test_gk203_a_layer_that_only_training_runs_gets_its_gradient_there(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(InTraining(), ["always", "more"])
    buffers = {name: buffer.clone() for name, buffer in adapted.named_buffers()}
    assert finding(gk.verify(adapted, batch), "GK203").severity is OK
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in adapted.named_buffers())
    never = adapted_toy(InTraining(), ["always", "more", "unused"])
    assert finding(gk.verify(never, batch), "GK203").evidence["dead"] == 2


@pytest.mark.rule_fails("GK203")
def test_gk203_a_tower_the_batch_leaves_unfed(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, scope=["language", "vision"], r=2))
    text_only = gk.example_batch(e2b, modalities=["text"])
    found = finding(gk.verify(adapted, text_only), "GK203")
    assert found.severity is ERROR
    assert "vision_tower" in (found.where or "")


@pytest.mark.rule_fails("GK203")
def test_gk203_gradients_that_are_not_finite(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"])
    found = finding(gk.verify(adapted, {"x": batch["x"] * float("inf")}), "GK203")
    assert found.severity is ERROR
    assert found.evidence["not_finite"] > 0


@pytest.mark.rule_fails("GK115")
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


@pytest.mark.rule_fails("GK508")
def test_gk508_a_saved_config_that_stock_peft_refuses(e2b: nn.Module) -> None:
    adapted = gk.attach(e2b, gk.plan(e2b, targets=["q_proj"], scope=["vision"], r=2))
    # What a redirecting tool leaves in adapter_config.json: the wrapper's name instead of the inner path.
    adapted.peft_config["default"].target_modules = {"q_proj"}
    found = finding(gk.verify(adapted, gk.example_batch(e2b)), "GK508")
    assert found.severity is ERROR
    assert "not supported" in found.message


@pytest.mark.rule_fails("GK508")
def test_gk508_tensors_that_the_reload_drops(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first", "part.linear"])
    adapted.peft_config["default"].target_modules = {"first"}
    assert finding(gk.verify(adapted, batch), "GK508").severity is ERROR


@pytest.mark.rule_fails("GK607")
def test_gk607_a_delta_that_swamps_the_base(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"]).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=30)
    found = finding(gk.verify(adapted, {"x": batch["x"].to(torch.bfloat16)}), "GK607")
    assert found.severity is ERROR
    assert found.evidence["worst_units"] <= found.evidence["allowed_units"]


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
    assert {code for code, verdict in verdicts(report).items() if verdict is UNKNOWN} >= CONTRACT - {"GK607"}
    assert "TypeError" in finding(report, "GK203").message


def test_a_model_without_adapter_is_an_error(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(VerifyError) as caught:
        gk.verify(Toy(Clamped()), batch)
    assert caught.value.code == "no-adapter"


def test_an_adapter_beside_the_layers_is_refused(twin_of: Callable[[str], nn.Module]) -> None:
    model = get_peft_model(twin_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(VerifyError, match="PROMPT_TUNING"):
        gk.verify(model)


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


# ---- verdicts that must not be "ok", and traces that must not be left ----


def fill(adapted: PeftModel, part: str, value: float) -> None:
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if part in name:
                parameter.fill_(value)


def test_gk601_and_others_never_call_nan_equal(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first", "part.linear"])
    fill(adapted, "lora_B", float("nan"))
    report = gk.verify(adapted, batch)
    assert not {f.code for f in report if f.severity is OK} & (CONTRACT | {"GK306"}), str(report)


class HalfMerging(nn.Module):
    """Two linears, the second of which PEFT cannot merge a lora_bias into: it has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.filterwarnings(
    "ignore:`lora_bias=True` was passed"
)  # PEFT says that the merge will fail; it is meant to
def test_gk601_a_merge_that_fails_midway_leaves_the_adapter_at_work(batch: dict[str, torch.Tensor]) -> None:
    adapted = get_peft_model(HalfMerging(), LoraConfig(r=4, target_modules=["first", "second"], lora_bias=True))
    fill(adapted, "lora_B", 0.1)
    before = adapted(**batch).detach()
    report = gk.verify(adapted, batch)
    assert finding(report, "GK601").severity is UNKNOWN
    assert finding(report, "GK607").severity is UNKNOWN
    assert torch.equal(adapted(**batch), before)
    assert not any(layer.merged for layer in (adapted.base_model.model.first, adapted.base_model.model.second))


@pytest.mark.rule_passes("GK607")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["dora", "oft"])
def test_gk607_methods_that_scale_or_rotate_are_not_held_to_the_unit_bound(
    twin_of: Callable[[str], nn.Module], method: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = twin_of("llama")
    report = gk.verify(gk.attach(model, gk.plan(model, method=method)), gk.example_batch(model))
    assert finding(report, "GK607").severity is OK, str(report)


@pytest.mark.rule_fails("GK607")
def test_gk607_an_unmerge_that_forgets_a_little(batch: dict[str, torch.Tensor]) -> None:
    from peft.tuners.lora.layer import Linear

    class Forgetful(Linear):
        def unmerge(self) -> None:
            super().unmerge()
            self.base_layer.weight.data.mul_(1 + 5e-6)

    adapted = adapted_toy(Clamped(), ["first"])
    adapted.base_model.model.first.__class__ = Forgetful
    found = finding(gk.verify(adapted, batch), "GK607")
    assert found.severity is ERROR
    assert found.evidence["worst_units"] > found.evidence["allowed_units"]


@pytest.mark.parametrize("initializer", ["pissa", "olora"])
def test_gk508_is_unknown_where_the_base_was_moved(twin_of: Callable[[str], nn.Module], initializer: str) -> None:
    model = twin_of("llama")
    adapted = gk.attach(model, gk.plan(model, r=4, init_lora_weights=initializer))
    report = gk.verify(adapted, gk.example_batch(model))
    assert finding(report, "GK508").severity is UNKNOWN
    assert finding(report, "GK115").severity is UNKNOWN
    assert "error" not in {str(f.severity) for f in report}


@pytest.mark.rule_fails("GK508")
def test_gk508_tensors_the_reload_has_no_place_for(batch: dict[str, torch.Tensor]) -> None:
    """The adapter on an unused layer changes no logit: only the tensors tell that it was lost."""
    adapted = adapted_toy(Clamped(), ["first", "unused"])
    adapted.peft_config["default"].target_modules = {"first"}
    assert finding(gk.verify(adapted, batch), "GK508").severity is ERROR


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_is_left_as_it_was(twin_of: Callable[[str], nn.Module], tmp_path: Any, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    twin_of("llama").save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}), device_map="cpu"
    )
    adapted = gk.attach(quantized, gk.plan(quantized, r=4))
    batch = gk.example_batch(quantized)
    passed = {name: id(parameter) for name, parameter in adapted.named_parameters()}
    report = gk.verify(adapted, batch)
    assert {name: id(parameter) for name, parameter in adapted.named_parameters()} == passed
    assert "error" not in {str(f.severity) for f in report}, str(report)
    assert finding(report, "GK601").severity is UNKNOWN
    assert finding(report, "GK508").severity is OK


def test_two_adapters_are_judged_by_the_active_one(batch: dict[str, torch.Tensor]) -> None:
    adapted = adapted_toy(Clamped(), ["first"])
    fill(adapted, "lora_B", 0.5)
    adapted.add_adapter("second", LoraConfig(r=4, target_modules=["first"]))
    assert finding(gk.verify(adapted, batch), "GK115").severity is UNKNOWN


@pytest.mark.parametrize(
    ("state", "code"),
    [
        pytest.param("merge_adapter", "adapter-merged", id="merged"),
        pytest.param("off", "adapter-disabled", id="off"),
    ],
)
def test_an_adapter_that_is_not_at_work_is_refused(batch: dict[str, torch.Tensor], state: str, code: str) -> None:
    adapted = adapted_toy(Clamped(), ["first"])
    adapted.merge_adapter() if state == "merge_adapter" else adapted.base_model.disable_adapter_layers()
    with pytest.raises(VerifyError) as caught:
        gk.verify(adapted, batch)
    assert caught.value.code == code


def test_verify_leaves_randomness_and_trainability_alone(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    adapted = gk.attach(model, gk.plan(model, r=2, modules_to_save=["lm_head"]))
    adapted.requires_grad_(False)
    state = torch.random.get_rng_state()
    gk.verify(adapted, gk.example_batch(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad or p.grad is not None for p in adapted.parameters())
