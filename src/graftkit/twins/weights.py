"""Random weights that make a tiny model behave like a trained one: every branch acts, and logits differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

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


def enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw the weights of ``model`` in place so that activations keep unit scale through every layer.

    Classes draw weights with a standard deviation of about 0.02, made for widths in the thousands; at width
    64 that leaves logits and gradients near zero, and a comparison of two of them proves nothing. Matrices
    are redrawn with standard deviation 1/sqrt(fan-in), bare constant tables with 0.5; constant vectors get
    a little noise on top of their constant; closed scalar gates are opened. Structured parameters (state
    matrices, time-step biases) keep what their class gave them. Tied parameters are visited once.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        for module, name, parameter in _own_parameters(model):
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if sum(size > 1 for size in parameter.shape) >= 2:
                known = isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)) and name == "weight"
                if known or _was_drawn(parameter):
                    table = not known and _is_constant(parameter)
                    std = _TABLE_STD if table else 1 / math.sqrt(_fan_in(module, parameter))
                    _draw(parameter, std, generator)
                    _keep_padding_row(module, parameter)
            elif parameter.numel() == 1:
                if parameter.item() == 0:
                    parameter.fill_(_OPEN_GATE)
            elif _is_constant(parameter):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(_VECTOR_NOISE * noise.to(parameter.dtype))


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _was_drawn(tensor: torch.Tensor) -> bool:
    values = tensor.float()
    return _is_constant(tensor) or bool(values.mean().abs() < _DRAWN * values.std())


def _fan_in(module: nn.Module, weight: torch.Tensor) -> int:
    """Inputs that one output sums over: out x in matrices, convolutions, and stacks of matrices."""
    from torch import nn

    if isinstance(module, nn.modules.conv._ConvNd):
        return math.prod(weight.shape[1:])
    return weight.shape[-1]


def _draw(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    import torch

    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def _keep_padding_row(module: nn.Module, parameter: torch.Tensor) -> None:
    padding = getattr(module, "padding_idx", None)
    if isinstance(padding, int) and parameter.ndim == 2:
        parameter[padding].zero_()
