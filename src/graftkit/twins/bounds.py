"""Finite bounds for a random model's bounded wrappers: a fresh model's are infinite, and clamp nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from graftkit.modeling.bounded_wrappers import BoundedWrapper, bounded_wrappers
from graftkit.modeling.entry import run

if TYPE_CHECKING:
    import torch
    from torch import nn

# Quantiles of a wrapper's own activations that become its bounds: 6 % of them are clamped.
_LOW, _HIGH = 0.03, 0.97
# For wrappers that no example input reaches: about where the quantiles lie for unit-scale activations.
_UNREACHED = 2.0


def calibrate_bounds(model: nn.Module, batch: Mapping[str, Any] | None) -> None:
    """Set every infinite bound so that it clamps a few percent of the activations of one forward pass.

    Each bound is set when the pass reaches it, so that later wrappers see activations that are already clamped.
    Finite bounds do not change.

    Args:
        model: changed in place.
        batch: inputs of the model, or None where there are none: the bounds then get a fixed value.
    """
    import torch

    wrappers = [wrapper for wrapper in bounded_wrappers(model) if _infinite(wrapper)]
    if not wrappers:
        return
    if batch is not None:
        with ExitStack() as hooks, torch.no_grad():
            for wrapper in wrappers:
                _set_when_called(hooks, wrapper)
            run(model, batch)
    for wrapper in wrappers:
        for name, bound in _infinite(wrapper).items():
            bound.fill_(-_UNREACHED if name.endswith("min") else _UNREACHED)


def _infinite(wrapper: BoundedWrapper) -> dict[str, torch.Tensor]:
    named = wrapper.bounds.items()
    return {name: bound for name, bound in named if name.endswith(("min", "max")) and bound.isinf()}


def _set_when_called(hooks: ExitStack, wrapper: BoundedWrapper) -> None:
    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        _set(wrapper, args[0], output=False)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        _set(wrapper, output, output=True)

    hooks.callback(wrapper.module.register_forward_pre_hook(before).remove)
    hooks.callback(wrapper.layer.register_forward_hook(after).remove)


def _set(wrapper: BoundedWrapper, values: torch.Tensor, *, output: bool) -> None:
    """Set the infinite bounds of the wrapper's input or output to quantiles of the values."""
    import torch

    quantiles = torch.tensor([_LOW, _HIGH])
    low, high = torch.quantile(values.detach().float().flatten(), quantiles).tolist()
    for name, bound in _infinite(wrapper).items():
        if low < high and name.startswith("out") == output:
            bound.fill_(low if name.endswith("min") else high)
