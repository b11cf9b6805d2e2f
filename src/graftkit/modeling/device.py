"""Batches on the device of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with its tensors on the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
