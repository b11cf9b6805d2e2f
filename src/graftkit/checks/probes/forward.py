"""One forward pass of a model: its logits, its loss, and how far two models' logits are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating
from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# Largest accepted difference of logits, relative to the largest logit. Sums are reordered by a merge, so single
# precision keeps about five digits and half precision about two.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's logits on ``batch`` in evaluation mode, float32 on the CPU, for text (B, T, vocabulary).

    Labels stay in the batch: an encoder-decoder makes its decoder's input from them.
    """
    import torch

    with evaluating(model), torch.no_grad():
        output = model(**on_device_of(model, batch))
    return first_tensor(output).float().cpu()


def first_tensor(output: Any) -> Tensor:
    """Return the logits of an output, or its first tensor if it has none."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    tensor = logits if logits is not None else output[0]
    return first_tensor(tensor) if isinstance(tensor, (tuple, list)) else tensor


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's own loss on ``batch``, or the mean square of its logits where it computes none."""
    output = model(**on_device_of(model, batch))
    loss = getattr(output, "loss", None)
    return loss if loss is not None else first_tensor(output).float().pow(2).mean()


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two logit tensors, relative to the largest logit of the first.

    It is infinite where either has a value that is not finite: such logits never count as equal.
    """
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    scale = a.abs().max().clamp_min(1e-12)
    return float((a - b).abs().max() / scale)


def tolerance(model: nn.Module) -> float:
    """Return the accepted ``difference`` for the coarsest floating dtype among the model's weights.

    Quantized weights count as half precision: they are dequantized to it, and 8-bit ones round the activations of
    a row by what else is in the batch.
    """
    if any(quantization_of(module) for module in model.modules()):
        return _TOLERANCE["bfloat16"]
    present = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return max((_TOLERANCE[name] for name in present if name in _TOLERANCE), default=_TOLERANCE["bfloat16"])


def room_for_copy(model: nn.Module) -> str | None:
    """Return why a second copy of the model would not fit in the CPU's memory, or None."""
    import psutil

    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = psutil.virtual_memory().available
    if next(model.parameters()).is_cuda or needed * 1.5 < free:
        return None
    return f"needs a second copy of the model: {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
