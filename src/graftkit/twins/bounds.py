"""Wrappers that clamp a linear's input and output: give the infinite bounds of a random model real values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Quantiles of a wrapper's own activations that become its bounds: 6 % of them are clamped.
_LOW, _HIGH = 0.03, 0.97
# For wrappers that no example input reaches: about where the quantiles lie for unit-scale activations.
_UNREACHED = 2.0


@dataclass(frozen=True)
class Clamp:
    """A module around one linear, with scalar bounds on what goes in or comes out.

    Attributes:
        path: the module's path in the model.
        wrapper: the module; its bounds are 0-dim buffers.
        linear: the linear it wraps.
        inputs: names of the bounds on the input, lower then upper, None where there is none.
        outputs: likewise for the output.
    """

    path: str
    wrapper: nn.Module
    linear: nn.Linear
    inputs: tuple[str | None, str | None]
    outputs: tuple[str | None, str | None]


def find_clamps(model: nn.Module) -> list[Clamp]:
    """Modules that hold 0-dim floating-point buffers named ``*min``/``*max`` next to exactly one linear."""
    return [clamp for path, module in model.named_modules() if (clamp := _as_clamp(path, module))]


def _as_clamp(path: str, module: nn.Module) -> Clamp | None:
    from torch import nn

    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    scalars = [
        name
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.ndim == 0 and buffer.is_floating_point() and name.endswith(("min", "max"))
    ]
    if len(linears) != 1 or not scalars:
        return None
    outputs = [name for name in scalars if name.startswith("out")]
    inputs = [name for name in scalars if name not in outputs]
    return Clamp(path, module, linears[0], _pair(inputs), _pair(outputs))


def _pair(names: list[str]) -> tuple[str | None, str | None]:
    lower = next((name for name in names if name.endswith("min")), None)
    upper = next((name for name in names if name.endswith("max")), None)
    return lower, upper


def calibrate(model: nn.Module, batch: Mapping[str, Any] | None) -> None:
    """Set every infinite bound so that it clamps a few percent of what one forward pass brings along.

    The bounds are set while the pass runs, in the order in which it reaches the wrappers, so that each is
    calibrated behind the clamps before it. Finite bounds are left alone.

    Args:
        model: changed in place.
        batch: inputs of the model, or None where there are none: the bounds then get a fixed value.
    """
    import torch

    clamps = [clamp for clamp in find_clamps(model) if _infinite(clamp)]
    if not clamps:
        return
    if batch is not None:
        handles = [handle for clamp in clamps for handle in _listen(clamp)]
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
    for clamp in clamps:
        for name, sign in _infinite(clamp):
            clamp.wrapper.get_buffer(name).fill_(sign * _UNREACHED)


def _infinite(clamp: Clamp) -> list[tuple[str, int]]:
    """Bounds that bound nothing, and the sign of each."""
    signed = [
        (name, sign) for pair in (clamp.inputs, clamp.outputs) for name, sign in zip(pair, (-1, 1), strict=True)
    ]
    return [(name, sign) for name, sign in signed if name and clamp.wrapper.get_buffer(name).isinf()]


def _listen(clamp: Clamp) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        _set(clamp, clamp.inputs, args[0])

    def after(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
        _set(clamp, clamp.outputs, output)

    return clamp.wrapper.register_forward_pre_hook(before), clamp.linear.register_forward_hook(after)


def _set(clamp: Clamp, names: tuple[str | None, str | None], values: torch.Tensor) -> None:
    import torch

    quantiles = torch.tensor([_LOW, _HIGH])
    low, high = torch.quantile(values.detach().float().flatten(), quantiles).tolist()
    if not low < high:
        return
    for name, bound in zip(names, (low, high), strict=True):
        if name and clamp.wrapper.get_buffer(name).isinf():
            clamp.wrapper.get_buffer(name).fill_(bound)
