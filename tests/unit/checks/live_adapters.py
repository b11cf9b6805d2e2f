"""Adapted models for the cases of rules."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

import graftkit as gk


def adapted(model: nn.Module, **plan: Any) -> PeftModel:
    """Attach a fresh adapter, of rank 4 unless the plan says otherwise."""
    return gk.attach(model, gk.plan(model, **{"r": 4, **plan}))


def with_effect(model: PeftModel) -> PeftModel:
    """Add noise to every trainable parameter, as training would change it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model
