"""Random weights that make a tiny model behave like a trained one: every branch acts, and logits differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Share of the noise on vectors (norm weights, biases) that their class initialised to one constant.
_VECTOR_NOISE = 0.05
# A bare table that its class filled with one constant (positions, queries) is added to activations of unit scale.
# With a matrix's small values it would have no effect, and a random tower would ignore positions.
_TABLE_STD = 0.5
# A gate that starts closed (tanh(0) = 0) would keep its branch out of the output and of every gradient.
_OPEN_GATE = 0.5
# Zero-mean tensors are the drawn ones: a structured initialisation (a state matrix, a rotation table) has a
# mean far from zero against its spread.
_DRAWN = 0.5


def redraw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw the weights of ``model`` in place so that activations keep unit scale through every layer.

    Classes draw weights with a standard deviation of about 0.02, made for widths in the thousands; at width
    64 that leaves logits and gradients near zero, and a comparison of two of them proves nothing. Matrices
    are redrawn with standard deviation 1/sqrt(fan-in), bare constant tables with 0.5; constant vectors get
    a little noise on top of their constant; scales of norms that were drawn around zero become ones with that
    noise; closed scalar gates are opened. Structured parameters (state matrices, time-step biases) keep what
    their class gave them. Tied parameters are visited once. Tables of a checkpoint that are not parameters, and
    that their class filled with zeros, are drawn at unit scale: codebooks, without which a codec decodes nothing.
    """
    import torch

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if _axes(parameter) > 1:
                parent, _, name = path.rpartition(".")
                _redraw(model.get_submodule(parent), name, parameter, generator)
                continue
            if parameter.numel() == 1:
                if parameter.item() == 0:
                    parameter.fill_(_OPEN_GATE)
                continue
            if _is_drawn_scale(model, path):
                parameter.fill_(1)
            if _is_constant(parameter):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(_VECTOR_NOISE * noise.to(parameter.dtype))
        for table in _empty_tables(model):
            table.copy_(torch.randn(table.shape, generator=generator))


def _empty_tables(model: nn.Module) -> Iterator[Tensor]:
    """Yield the floating-point buffers of a checkpoint, of two axes or more, in which there is nothing yet."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved and _axes(buffer) > 1 and buffer.is_floating_point() and not buffer.any():
                yield buffer


def _axes(tensor: Tensor) -> int:
    return sum(size > 1 for size in tensor.shape)


def _is_drawn_scale(model: nn.Module, path: str) -> bool:
    """Check whether this is the scale of a norm that its class has drawn around zero, as if it were a matrix."""
    from torch import nn

    parent, _, name = path.rpartition(".")
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    scale = model.get_parameter(path)
    return (
        name == "weight"
        and isinstance(model.get_submodule(parent), norms)
        and not _is_constant(scale)
        and _was_drawn(scale)
    )


def _redraw(module: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Redraw a matrix or a stack of them, unless its class gave it a structure; a padding row stays zero."""
    import torch
    from torch import nn

    known = isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)) and name == "weight"
    if not known and not _was_drawn(parameter):
        return
    table = not known and _is_constant(parameter)
    std = _TABLE_STD if table else 1 / math.sqrt(_fan_in(module, parameter))
    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    padding = getattr(module, "padding_idx", None)
    if isinstance(padding, int) and parameter.ndim == 2:
        parameter[padding].zero_()


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _was_drawn(tensor: torch.Tensor) -> bool:
    values = tensor.float()
    return _is_constant(tensor) or bool(values.mean().abs() < _DRAWN * values.std())


def _fan_in(module: nn.Module, weight: torch.Tensor) -> int:
    """Return how many inputs one output sums over: out x in matrices, convolutions, and stacks of matrices."""
    from torch import nn

    if isinstance(module, nn.modules.conv._ConvNd):
        return math.prod(weight.shape[1:])
    return weight.shape[-1]
