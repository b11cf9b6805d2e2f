"""Modules that wrap one linear, found by structure, not by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.surveying.sites import Wrapper

if TYPE_CHECKING:
    from torch import nn


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
            found[path] = Wrapper(type(modules[outer]).__name__, outer)
    return found


def _wraps(module: nn.Module, owned: set[int]) -> bool:
    from torch import nn

    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return bool(owned) and {id(p) for p in module.parameters()} == owned
