"""Modules that wrap one linear, found by structure, not by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit.surveying.sites import Wrapper

if TYPE_CHECKING:
    from torch import Tensor, nn


def wrappers_of(model: nn.Module, linear_paths: frozenset[str]) -> dict[str, Wrapper]:
    """Find the wrapped linears of a model.

    A wrapper holds exactly one of ``linear_paths``, that linear holds all of the wrapper's parameters, and
    the wrapper's class defines its forward (a plain container does not). Wrappers may nest.

    Returns:
        Linear path -> the outermost wrapper around it.
    """
    modules = dict(model.named_modules())
    found: dict[str, Wrapper] = {}
    for path in linear_paths:
        owned = {id(p) for p in modules[path].parameters()}
        outer = path
        while (parent := outer.rpartition(".")[0]) and _wraps(modules[parent], owned):
            outer = parent
        if outer != path:
            wrapper = Wrapper(type(modules[outer]).__name__, outer)
            bounded = any(_may_clamp(modules[level]) for level in wrapper.levels(path))
            found[path] = replace(wrapper, bounded=bounded)
    return found


def bounds_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the bounds that a module holds, by name: 0-dim floating-point buffers."""
    buffers = module.named_buffers(recurse=False)
    return {name: buffer for name, buffer in buffers if buffer.ndim == 0 and buffer.is_floating_point()}


def _may_clamp(wrapper: nn.Module) -> bool:
    """Check for a bound that is finite, or not known."""
    return any(bound.is_meta or bool(bound.isfinite()) for bound in bounds_of(wrapper).values())


def _wraps(module: nn.Module, owned: set[int]) -> bool:
    from torch import nn

    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return bool(owned) and {id(p) for p in module.parameters()} == owned
