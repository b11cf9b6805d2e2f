"""A model without the autocast that a trainer has put around its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Take off the autocast that accelerate puts around the forward pass of a model in float32.

    What is computed then has the precision of the weights; autocast rounds to half precision.
    Source: ``accelerate.Accelerator.prepare_model`` keeps the forward that it replaces.
    """
    import torch

    own = vars(model).get("_original_forward")
    quantized = any(quantization_of(module) for module in model.modules())
    half = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    if own is None or half or quantized:
        yield
        return
    patched = vars(model).pop("forward")
    vars(model)["forward"] = own
    try:
        yield
    finally:
        vars(model)["forward"] = patched
