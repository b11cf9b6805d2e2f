"""What rooms ask of a live model: its mode is restored, and wrappers come off its parts and its names."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graftkit.modeling.bounded_wrappers import bounded_wrappers, count_clamped, watch_bounds
from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating, in_training_mode, keep_modes
from graftkit.modeling.unwrapping import base_model_of, name_in_base


class Clamped(nn.Module):
    """A linear with bounds on its input and its output."""

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.register_buffer("input_min", torch.tensor(low))
        self.register_buffer("output_max", torch.tensor(high), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.clamp_min(self.input_min)).clamp_max(self.output_max)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Clamped()
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.first(x))


def mixed_modes() -> tuple[Net, list[bool]]:
    """A model whose modules are in different modes."""
    model = Net()
    model.dropout.eval()
    return model, [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back() -> None:
    model, before = mixed_modes()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_modes_come_back_after_an_error() -> None:
    model, before = mixed_modes()
    with pytest.raises(KeyError), keep_modes(model):
        model.train()
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_training_mode_leaves_no_statistics_behind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval()
    kept = model[0].running_mean
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), in_training_mode(model):
        assert all(module.training for module in model.modules())
        model(torch.randn(4, 3))
        assert not torch.equal(kept, before["0.running_mean"])
        model[0].running_mean = torch.ones(3)
        raise KeyError
    assert not any(module.training for module in model.modules())
    assert model[0].running_mean is kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_4bit_linears_are_not_put_into_evaluation_mode() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), nn.Linear(64, 64))
    model[1].eval()
    with evaluating(model):
        assert [module.training for module in model] == [True, False]


def test_bounded_wrappers_are_the_same_with_and_without_an_adapter() -> None:
    model = nn.Sequential(Clamped(), nn.Sequential(nn.Linear(4, 4)), nn.LayerNorm(4))
    assert [wrapper.path for wrapper in bounded_wrappers(model)] == ["0"]
    assert list(bounded_wrappers(model)[0].bounds) == ["input_min"], "only what a checkpoint stores"
    adapted = get_peft_model(model, LoraConfig(target_modules=["linear"], r=2))
    assert [wrapper.path for wrapper in bounded_wrappers(adapted)] == ["base_model.model.0"]


def test_what_a_wrapper_clamps_is_seen_and_no_hook_stays() -> None:
    model = Net().eval()
    nn.init.eye_(model.first.linear.weight)
    seen: list[int] = []
    with watch_bounds(
        bounded_wrappers(model), lambda _, before, after: seen.append(int(count_clamped(before, after)))
    ):
        model(torch.tensor([[-3.0, -0.5, 0.5, 3.0]]))
    assert seen == [1, 1], "one value at the input, one at the output"
    assert not any(module._forward_hooks for module in model.modules())


def test_the_base_inside_peft_and_ddp(tmp_path: object) -> None:
    model = Net()
    adapted = get_peft_model(model, LoraConfig(target_modules=["linear"], r=2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert base_model_of(DistributedDataParallel(adapted)) is model
    finally:
        torch.distributed.destroy_process_group()
    assert base_model_of(adapted) is model
    assert base_model_of(model) is model


def test_names_as_the_base_has_them() -> None:
    assert name_in_base("base_model.model._fsdp_wrapped_module.first.linear.weight") == "first.linear.weight"
    assert name_in_base("first.linear.weight") == "first.linear.weight"


def test_a_batch_on_the_models_device() -> None:
    batch = on_device_of(Net().to("meta"), {"x": torch.ones(2), "return_loss": True})
    assert batch["x"].device.type == "meta"
    assert batch["return_loss"] is True
