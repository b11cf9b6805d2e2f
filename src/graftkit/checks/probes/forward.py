"""How far the outputs of two forward passes are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.modeling.outputs import main_output, outputs_of
from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# Largest accepted difference of an output, relative to its largest value. Sums are reordered by a merge, so single
# precision keeps about five digits and half precision about two.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of two forward passes are apart.

    Attributes:
        difference: the largest of all outputs, each relative to its own largest value; infinite where a value is
            not finite, a shape differs, or only one of the passes has an output of that name.
        worst: the name of the output that differs most; "" where the output is a tensor.
        outputs: how many outputs were compared.
    """

    difference: float
    worst: str
    outputs: int

    @property
    def figures(self) -> dict[str, Any]:
        """What a finding says of the comparison."""
        return {"difference": self.difference, "outputs": self.outputs, "worst_output": self.worst}


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Comparison:
    """Compare the outputs of two passes, as ``outputs_of`` returns them.

    Raises:
        ValueError: neither has an output.
    """
    apart = {
        name: difference(a[name], b[name]) if name in a and name in b else float("inf") for name in {**a, **b}
    }
    worst = max(apart, key=lambda name: apart[name])
    return Comparison(apart[worst], worst, len(apart))


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's main output on ``batch`` in evaluation mode, on the CPU, for text (B, T, vocabulary).

    Raises:
        ValueError: the model returns no floating-point tensor.
    """
    return main_output(outputs_of(model, batch))


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value of the first.

    It is infinite where their shapes differ or a value is not finite: such outputs never count as equal. Minus
    infinity is a value where both have it, beside finite ones: the logits of what is masked.
    """
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    compared = ~(a.isneginf() & b.isneginf())
    a, b = a[compared], b[compared]
    if not a.numel() or not (a.isfinite().all() and b.isfinite().all()):
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
