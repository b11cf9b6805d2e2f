"""Modules that wrap one linear, or are composed of a few, found by structure, not by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
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


def composites_of(model: nn.Module, linear_paths: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Find the modules that are composed of linears: a norm and a linear, a gate and a value, a whole MLP.

    All of a composite's matrices are those of ``linear_paths`` inside it, its class defines its forward, and each
    of its children holds one linear at most, or the only child with linears is a composite itself. So a block that
    is made of other blocks (a layer of attention and MLP) is none, and a wrapper of one linear is none.

    Returns:
        Path of a composite -> the paths of its linears, in the model's order.
    """
    modules = dict(model.named_modules())
    inside: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        if path in linear_paths:
            for parent in _parents(path):
                inside[parent].append(path)
    others = {parent for path in _other_matrices(model, linear_paths) for parent in (path, *_parents(path))}
    wrapped = {
        level for path, wrapper in wrappers_of(model, linear_paths).items() for level in wrapper.levels(path)
    }
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(inside.keys() - others - wrapped - linear_paths, key=lambda path: -path.count(".")):
        children = Counter(".".join(linear.split(".")[: path.count(".") + 2]) for linear in inside[path])
        is_one = max(children.values()) == 1 or (len(children) == 1 and next(iter(children)) in found)
        if is_one and _has_forward(modules[path]):
            found[path] = tuple(inside[path])
    return {path: found[path] for path in modules if path in found}


def _other_matrices(model: nn.Module, linear_paths: frozenset[str]) -> Iterable[str]:
    """Yield the modules that own a matrix and are neither one of the linears nor a part of one (an adapter)."""
    for path, module in model.named_modules():
        if linear_paths.isdisjoint((path, *_parents(path))) and any(
            parameter.ndim > 1 for parameter in module.parameters(recurse=False)
        ):
            yield path


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _wraps(module: nn.Module, owned: set[int]) -> bool:
    return _has_forward(module) and bool(owned) and {id(p) for p in module.parameters()} == owned


def _has_forward(module: nn.Module) -> bool:
    """Check whether a module computes something itself: a plain container does not."""
    from torch import nn

    is_container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return not is_container and type(module).forward is not nn.Module.forward
