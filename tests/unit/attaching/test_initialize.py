"""Initializers that need data: the right one at the right time, on towers too, and the model's output kept."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraGAConfig
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.attaching.initialize import initialize
from graftkit.checks.probes.forward import difference, logits_of
from graftkit.errors import AttachError, MissingDependencyError
from graftkit.planning.initializers import INITIALIZERS
from graftkit.planning.matching import matched_by

DATA_DRIVEN = [row.name for row in INITIALIZERS if row.needs_data]


def batches(model: Any, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    return [gk.example_batch(model, seed=seed, **options) for seed in range(count)]


def tensors(adapted: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in adapted.named_parameters() if f".{part}." in name}


def plan_for(model: Any, init: Any, scope: Any = ("language", "vision", "audio"), **options: Any) -> gk.Plan:
    return gk.plan(model, targets=["attention"], scope=list(scope), init_lora_weights=init, **{"r": 2, **options})


@pytest.mark.parametrize("init", DATA_DRIVEN)
def test_every_planned_layer_is_initialized_towers_included(e2b: nn.Module, init: str) -> None:
    data = batches(e2b)
    before = logits_of(e2b, data[0])
    # Without redistribution, which may take an adapter off a layer.
    options = {"eva_config": eva(rho=1.0)} if init == "eva" else {}
    plan = plan_for(e2b, init, **options)
    assert {a.site.tower for a in plan.attached if a.site.wrapper} == {"vision", "audio"}
    adapted = initialize(e2b, plan, data)
    assert adapted_sites(adapted) == {a.path for a in plan.attached}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params
    assert difference(before, logits_of(adapted, data[0])) < 1e-4
    b = tensors(adapted, "lora_B")
    assert len(b) == len(plan.attached)
    # EVA starts at B = 0 and chooses A; the others choose both.
    assert all(bool(t.any()) is (init != "eva") for t in b.values())
    assert all(t.any() for t in tensors(adapted, "lora_A").values())


def eva(**options: Any) -> Any:
    from peft import EvaConfig

    return EvaConfig(**options)


def test_eva_chooses_directions_of_the_layer_s_own_inputs(e2b: nn.Module) -> None:
    data = batches(e2b)
    plan = plan_for(e2b, "eva", ["vision"], eva_config=eva(rho=1.0))
    path = plan.attached[0].path
    seen: list[torch.Tensor] = []
    hook = e2b.get_submodule(path).register_forward_hook(lambda _m, args, _o: seen.append(args[0].detach()))
    for batch in data:
        logits_of(e2b, batch)
    hook.remove()
    rows = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
    components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:2]
    adapted = initialize(e2b, plan, data)
    found = next(t for name, t in tensors(adapted, "lora_A").items() if path in name)
    # The same plane, whatever its basis.
    assert (found @ components.T).norm() > 0.95 * 2**0.5


def test_eva_may_move_ranks_between_layers(e2b: nn.Module) -> None:
    plan = plan_for(e2b, "eva")
    adapted = initialize(e2b, plan, batches(e2b))
    assert adapted_sites(adapted) <= {a.path for a in plan.attached}
    assert adapted.peft_config["default"].rank_pattern
    assert not plan.peft_config.rank_pattern


def test_eva_s_targets_name_no_layer_that_it_took_the_adapter_off(e2b: nn.Module) -> None:
    """Of 20 targets and more PEFT makes suffixes, which reach such layers again."""
    plan = gk.plan(e2b, scope="all", r=1, init_lora_weights="eva", eva_config={"rho": 4.0, "tau": 0.5})
    adapted = initialize(e2b, plan, batches(e2b, 3, batch_size=4))
    kept = adapted_sites(adapted)
    assert 20 <= len(kept) < len(plan.attached)
    targets = adapted.peft_config["default"].target_modules
    plain = adapted.unload()
    assert set(matched_by(targets, [name for name, _ in plain.named_modules()])) == kept


def test_a_base_that_cannot_hold_the_difference_is_left_as_it_was(twin_of: Callable[[str], nn.Module]) -> None:
    """LoRA-GA takes the gradient's directions out, however large the scale makes them."""
    model = twin_of("llama").to(torch.bfloat16)
    data, before = batches(model), state(model)
    with pytest.raises(AttachError) as caught:
        initialize(model, plan_for(model, "lora_ga", ["language"], alpha=2**14), data)
    assert caught.value.code == "initialize-rounding"
    assert same(before, state(model))


def test_a_rank_beyond_the_layer_is_refused(twin_of: Callable[[str], nn.Module]) -> None:
    """LoRA-GA needs two directions for each rank; PEFT would make factors of other shapes.

    A plan leaves such layers alone; a configuration of the user's need not come from one.
    """
    model: Any = twin_of("llama")
    before = state(model)
    plan = plan_for(model, True, ["language"], r=64)
    config: Any = copy.deepcopy(plan.peft_config)
    config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()
    with pytest.raises(AttachError) as caught:
        initialize(model, dataclasses.replace(plan, peft_config=config), batches(model))
    assert caught.value.code == "initialize-rank"
    assert same(before, state(model))


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_plan_that_needs_no_data_is_attached_and_the_batches_left_alone(e2b: nn.Module, init: Any) -> None:
    plan = plan_for(e2b, init)
    untouched = iter([{"never": "read"}])
    adapted = initialize(e2b, plan, untouched)
    assert adapted_sites(adapted) == {a.path for a in plan.attached}
    assert next(untouched) == {"never": "read"}


@pytest.mark.parametrize("init", DATA_DRIVEN)
def test_one_batch_alone_and_a_plain_model_work(twin_of: Callable[[str], nn.Module], init: str) -> None:
    model = twin_of("llama")
    adapted = initialize(model, plan_for(model, init, ["language"]), gk.example_batch(model, batch_size=3))
    assert all(t.any() for t in tensors(adapted, "lora_A").values())


@pytest.mark.parametrize("init", DATA_DRIVEN)
def test_the_training_mode_and_the_plan_are_kept(e2b: nn.Module, init: str) -> None:
    e2b.train()
    e2b.get_submodule("model.audio_tower").eval()
    modes = {name: m.training for name, m in e2b.named_modules()}
    plan = plan_for(e2b, init, ["language"])
    before = plan.to_dict()
    initialize(e2b, plan, batches(e2b))
    kept = {name: m.training for name, m in e2b.named_modules() if name in modes and "self_attn" not in name}
    assert kept.items() <= modes.items()
    assert plan.to_dict() == before


@pytest.mark.parametrize("init", DATA_DRIVEN)
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param({"count": 0}, "initialize-empty", "batches", id="no batches"),
        pytest.param(
            {"modalities": ["text"]}, "initialize-unreached", "vision_tower", id="a tower that is not fed"
        ),
    ],
)
def test_data_that_cannot_initialize_is_refused_and_the_model_left_as_it_was(
    e2b: nn.Module, init: str, options: dict[str, Any], code: str, said: str
) -> None:
    before = state(e2b)
    with pytest.raises(AttachError) as caught:
        initialize(e2b, plan_for(e2b, init), batches(e2b, **options))
    assert caught.value.code == code
    assert said in str(caught.value)
    assert same(before, state(e2b))


def state(model: nn.Module) -> dict[str, Any]:
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )
    notes = {f"{n}:{key}" for n, m in model.named_modules() for key in vars(m) if not key.startswith("_is_")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {**{n: t.clone() for n, t in model.state_dict().items()}, "": (hooks, notes, trained)}


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a[""] == b[""] and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a if n)


def test_eva_says_when_the_batches_are_too_small(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, targets=["attention"], r=16, init_lora_weights="eva")
    with pytest.raises(AttachError) as caught:
        initialize(model, plan, batches(model, batch_size=1))
    assert caught.value.code == "initialize-few"
    assert "rho" in str(caught.value)


@pytest.mark.parametrize("init", DATA_DRIVEN)
def test_statistics_of_the_base_are_kept(init: str) -> None:
    """PEFT's LoRA-GA runs the model in training mode, in which batch norms count what they see."""
    model: Any = gk.twin("granite_speech")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    plan = gk.plan(model, targets="attention", scope="audio", r=2, init_lora_weights=init)
    base = initialize(model, plan, batches(model, batch_size=4)).get_base_model()
    after = dict(base.named_buffers())
    assert [name for name, buffer in before.items() if not torch.equal(buffer, after[name])] == []


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_class_without_a_forward_is_run_by_its_parts(init: str) -> None:
    model: Any = gk.twin("bark")
    plan = gk.plan(model, targets="all-linear", scope="all", r=2, init_lora_weights=init)
    adapted = initialize(model, plan, batches(model, batch_size=4))
    assert adapted_sites(adapted) <= {a.path for a in plan.attached}
    assert all(t.any() for t in tensors(adapted, "lora_A").values())


def test_eva_reads_inputs_that_are_transposed() -> None:
    model: Any = gk.twin("clap")
    options = {"init_lora_weights": "eva", "eva_config": eva(rho=1.0)}
    plan = gk.plan(model, targets="all-linear", r=1, allow_unmatched=True, **options)
    adapted = initialize(model, plan, batches(model, batch_size=2))
    assert all(t.any() for t in tensors(adapted, "lora_A").values())


def test_lora_ga_needs_a_loss(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    data = batches(model)
    for batch in data:
        del batch["labels"]
    with pytest.raises(AttachError) as caught:
        initialize(model, plan_for(model, "lora_ga", ["language"]), data)
    assert caught.value.code == "initialize-loss"


def test_corda_without_attrs_says_what_to_install(
    twin_of: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = twin_of("llama")
    monkeypatch.setitem(sys.modules, "attr", None)
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.corda", raising=False)
    with pytest.raises(MissingDependencyError, match="attr"):
        initialize(model, plan_for(model, "corda", ["language"]), batches(model))
