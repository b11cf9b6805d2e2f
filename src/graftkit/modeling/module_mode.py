"""Evaluation or training mode for the time of a block, with every module's own mode restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own mode after the block, whatever the block does to it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode for the block, and restore every module's own mode after it.

    4-bit linears stay in training mode: in evaluation mode, on a CPU with AVX512-BF16, bitsandbytes repacks them
    for good, and fails where their width is not a multiple of 32 (bitsandbytes.nn.Linear4bit.forward). Nothing
    else in them depends on the mode.
    """
    with keep_modes(model):
        model.eval()
        for module in model.modules():
            # PEFT's layer shows the packed weight of the linear inside it, and may itself depend on the mode.
            if quantization_of(module) == "bitsandbytes 4-bit" and not hasattr(module, "base_layer"):
                module.training = True
        yield


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode for the block; restore after it the modes, and what it wrote into buffers.

    Norms over a batch keep running statistics in training mode, and quantizers the averages of their codes.
    """
    import torch

    owners = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for _, named in owners for buffer in named.values() if buffer is not None]
    with keep_modes(model):
        model.train()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
            for module, named in owners:
                module._buffers.update(named)
