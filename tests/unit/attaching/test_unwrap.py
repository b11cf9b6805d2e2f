"""Wrappers are out while the model computes, and back, the very same, whenever parameters are named."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.attaching.unwrap import unwrap
from graftkit.checks.probes.forward import logits_of
from graftkit.errors import AttachError

E2B = "google/gemma-4-E2B-it"


@pytest.fixture
def unbounded(e2b: nn.Module) -> nn.Module:
    """E2B with infinite bounds, as in the released models whose clipping is off."""
    for name, buffer in e2b.named_buffers():
        if name.endswith(("put_min", "put_max")):
            buffer.fill_(-math.inf if name.endswith("min") else math.inf)
    return e2b


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def wrappers_in(model: nn.Module) -> int:
    return sum(type(module).__name__ == "Gemma4ClippableLinear" for module in model.modules())


def test_finite_bounds_are_refused_and_nothing_is_touched(e2b: nn.Module) -> None:
    count = wrappers_in(e2b)
    with pytest.raises(AttachError, match=r"input_min|input_max") as caught:
        unwrap(e2b)
    assert caught.value.code == "unwrap-changes-outputs"
    assert wrappers_in(e2b) == count > 0


def test_some_wrappers_alone(e2b: nn.Module) -> None:
    paths = [site.wrapper.path for site in gk.survey(e2b) if site.wrapper][1:3]
    count = wrappers_in(e2b)
    with unwrap(e2b, paths=paths, allow_change=True) as handle:
        assert handle.wrappers == tuple(paths)
        assert wrappers_in(e2b) == count - 2
        assert all(isinstance(e2b.get_submodule(path), nn.Linear) for path in paths)
    assert wrappers_in(e2b) == count


def test_a_path_without_a_wrapper_is_refused_and_nothing_is_touched(unbounded: nn.Module) -> None:
    path = next(site.wrapper.path for site in gk.survey(unbounded) if site.wrapper)
    count = wrappers_in(unbounded)
    with pytest.raises(AttachError) as caught:
        unwrap(unbounded, paths=[path, f"{path}.linear"])
    assert caught.value.code == "unwrap-no-wrapper"
    assert caught.value.where == f"{path}.linear"
    assert wrappers_in(unbounded) == count


def test_outputs_are_the_same_bit_for_bit_and_the_same_wrappers_return(unbounded: nn.Module) -> None:
    batch = gk.example_batch(unbounded)
    before = logits_of(unbounded, batch)
    modules = {path: id(module) for path, module in unbounded.named_modules()}
    with unwrap(unbounded) as handle:
        assert handle.wrappers
        assert wrappers_in(unbounded) == 0
        assert torch.equal(logits_of(unbounded, batch), before)
    assert {path: id(module) for path, module in unbounded.named_modules()} == modules
    assert torch.equal(logits_of(unbounded, batch), before)
    assert not unbounded._forward_pre_hooks


def test_plain_names_train_while_unwrapped_and_the_adapter_loads_in_stock_peft(
    unbounded: nn.Module, tmp_path: Path
) -> None:
    plain = copy.deepcopy(unbounded)
    batch = gk.example_batch(unbounded)
    with unwrap(unbounded):
        adapted = get_peft_model(unbounded, lora(rank_pattern={"q_proj": 3}))
        during = logits_of(adapted, batch)
        adapted(**batch).loss.backward()
        assert wrappers_in(unbounded) == 0
        adapted.save_pretrained(tmp_path / "during")
    assert torch.equal(logits_of(adapted, batch), during)
    adapted.save_pretrained(tmp_path / "after")
    for name in ("during", "after"):
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name)
        assert adapted_sites(again) == adapted_sites(adapted)
        assert torch.equal(logits_of(again, batch), during)
        layers = {n: m for n, m in again.named_modules() if hasattr(m, "lora_A")}
        assert all(m.r["default"] == (3 if "q_proj" in n else 2) for n, m in layers.items())
        assert any(n.endswith("q_proj.linear") for n in layers)


def test_an_adapter_that_was_there_before_stays(unbounded: nn.Module) -> None:
    plan = gk.plan(unbounded, targets=["q_proj"], scope="all", r=2)
    adapted = gk.attach(unbounded, plan)
    sites = adapted_sites(adapted)
    targets = adapted.peft_config["default"].target_modules
    batch = gk.example_batch(unbounded)
    before = logits_of(adapted, batch)
    with unwrap(adapted):
        assert wrappers_in(adapted) == 0
        assert torch.equal(logits_of(adapted, batch), before)
    assert adapted_sites(adapted) == sites
    assert adapted.peft_config["default"].target_modules == targets


def test_ia3_follows(unbounded: nn.Module, tmp_path: Path) -> None:
    plain = copy.deepcopy(unbounded)
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    with unwrap(unbounded):
        adapted = get_peft_model(unbounded, config)
        adapted.save_pretrained(tmp_path)
        adapted(**gk.example_batch(unbounded))
        adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path)
    kinds = {n: m.is_feedforward for n, m in again.named_modules() if hasattr(m, "ia3_l")}
    assert kinds
    assert all(is_ff == ("down_proj" in n) for n, is_ff in kinds.items())


def test_a_checkpoint_saved_while_unwrapped_is_the_bases(e2b: Any, tmp_path: Path) -> None:
    e2b.save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    batch = gk.example_batch(e2b)
    with unwrap(e2b, allow_change=True):
        for name in ("first", "second"):
            e2b(**batch)
            assert wrappers_in(e2b) == 0
            e2b.save_pretrained(tmp_path / name)
            saved = load_file(tmp_path / name / "model.safetensors")
            assert saved.keys() == base.keys()
            assert all(torch.equal(saved[key], base[key]) for key in base)
    assert any(key.endswith("input_min") for key in base)


def test_a_part_of_the_model_is_saved_right_as_well(e2b: Any) -> None:
    tower = e2b.model.vision_tower
    keys = list(tower.state_dict())
    with unwrap(e2b, allow_change=True):
        assert list(tower.state_dict()) == keys


def test_the_bases_checkpoint_loads_while_unwrapped(e2b: Any, twin_of: Callable[[str], nn.Module]) -> None:
    batch = gk.example_batch(e2b)
    expected = logits_of(e2b, batch)
    state = {name: tensor.clone() for name, tensor in e2b.state_dict().items()}
    with torch.no_grad():
        for tensor in e2b.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    with unwrap(e2b, allow_change=True):
        e2b.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(e2b, batch), expected)


def test_allowing_the_change_changes_outputs(e2b: nn.Module) -> None:
    batch = gk.example_batch(e2b)
    before = logits_of(e2b, batch)
    with unwrap(e2b, allow_change=True):
        assert not torch.equal(logits_of(e2b, batch), before)
    assert torch.equal(logits_of(e2b, batch), before)


def test_a_cast_meanwhile_reaches_the_wrappers(unbounded: Any) -> None:
    with unwrap(unbounded):
        unbounded.to(torch.bfloat16)
    assert {b.dtype for n, b in unbounded.named_buffers() if n.endswith("input_min")} == {torch.bfloat16}


def test_a_copy_taken_meanwhile_is_whole(unbounded: Any) -> None:
    keys = list(unbounded.state_dict())
    with unwrap(unbounded):
        twin = copy.deepcopy(unbounded)
    assert wrappers_in(twin) == 0
    assert list(twin.state_dict()) == keys
    assert wrappers_in(twin) == wrappers_in(unbounded)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in unbounded.modules()}


def test_moshis_wrappers_are_called_with_more_than_a_linear_takes(twin_of: Callable[[str], nn.Module]) -> None:
    """MoshiLinear computes what its linear does, and its callers pass it a layer's number too."""
    for allow_change in (False, True):
        with pytest.raises(AttachError, match="layer_idx") as caught:
            unwrap(twin_of("moshi"), allow_change=allow_change)
        assert caught.value.code == "unwrap-other-arguments"


def test_a_model_without_wrappers_is_left_alone(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    with unwrap(model) as handle:
        assert handle.wrappers == ()
        assert not model._forward_pre_hooks


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-5, 5)


class Fussy(Bent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 1:
            raise ValueError("one at a time")
        return self.linear(x)


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        pytest.param(Bent, "Bent", id="acts"),
        pytest.param(Fussy, "ValueError: one at a time", id="cannot be tried"),
    ],
)
def test_a_wrapper_without_buffers_is_tried(wrapper: type[nn.Module], said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), wrapper())
    with pytest.raises(AttachError, match=said) as caught:
        unwrap(model)
    assert caught.value.code == "unwrap-changes-outputs"


def test_weights_that_are_not_loaded_cannot_be_tried() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Bent())
    with pytest.raises(AttachError) as caught:
        unwrap(model)
    assert caught.value.code == "unwrap-changes-outputs"


def test_a_place_that_is_gone_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Bent())
    handle = unwrap(model, allow_change=True)
    del model[1]
    with pytest.raises(AttachError) as caught:
        handle.rewrap()
    assert caught.value.code == "unwrap-place-gone"
