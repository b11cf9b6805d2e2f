"""Batches on the device of a model, and in its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with its tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def cast_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch on the model's device, its floating-point tensors in the model's type; flags stay."""
    import torch

    device, dtype = model.device, model.dtype

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: cast(value) for name, value in batch.items()}
