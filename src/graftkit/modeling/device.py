"""Batches on the device of a model, and in its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with all tensors, inside mappings too, on the device of the model's first parameter."""
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(inner) for name, inner in value.items()}
        return value.to(device) if hasattr(value, "to") else value

    return {name: moved(value) for name, value in batch.items()}


def cast_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch on the model's device, its floating-point tensors in the model's type; flags stay.

    Tensors inside mappings are cast too.
    """
    import torch

    device, dtype = model.device, model.dtype

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(inner) for name, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: cast(value) for name, value in batch.items()}
