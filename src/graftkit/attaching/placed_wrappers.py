"""A model's wrappers: taken out of their places, put back, and named in the configurations of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import adapted_sites
from graftkit.attaching.redirect import ModelPaths, renamed, retargeted
from graftkit.errors import AttachError
from graftkit.modeling.unwrapping import base_layer_of

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class PlacedWrapper:
    """One wrapper, and where it belongs.

    Attributes:
        path: of the wrapper.
        inside: the path of its linear within it, e.g. "linear".
        holders: the modules that have the wrapper as a child, and the child's name in each.
        dtype: of the linear's weight when the wrapper was found.
    """

    path: str
    wrapper: nn.Module
    inside: str
    holders: tuple[tuple[nn.Module, str], ...]
    dtype: torch.dtype

    @property
    def inner_path(self) -> str:
        return f"{self.path}.{self.inside}"

    @property
    def socket(self) -> tuple[nn.Module, str]:
        """The module within the wrapper that has the linear as a child, and the child's name."""
        parent, _, leaf = self.inside.rpartition(".")
        return self.wrapper.get_submodule(parent), leaf

    @property
    def inner(self) -> Any:
        return self.wrapper.get_submodule(self.inside)

    def take_out(self) -> None:
        inner = self.inner
        for holder, name in self.holders:
            setattr(holder, name, inner)

    def put_back(self) -> None:
        holder, name = self.holders[0]
        inner = holder._modules.get(name)
        if inner is None:
            raise AttachError(
                "a wrapper cannot be put back: its place is gone",
                where=self.path,
                why=f"{type(holder).__name__} no longer has {name}",
                help="call rewrap() before the model is taken apart",
                code="unwrap-place-gone",
            )
        self._follow(inner)
        parent, leaf = self.socket
        setattr(parent, leaf, inner)
        for holder, name in self.holders:
            setattr(holder, name, self.wrapper)

    def _follow(self, inner: nn.Module) -> None:
        """Do to the wrapper what was done to its linear meanwhile: moved to a device, cast, set to a mode."""
        weight = base_layer_of(inner).weight
        cast = weight.is_floating_point() and weight.dtype != self.dtype
        self.wrapper.training = inner.training
        for module in self.wrapper.modules():
            for name, buffer in module.named_buffers(recurse=False):
                dtype = weight.dtype if cast and buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(weight.device, dtype)


def placed_wrappers(model: nn.Module) -> list[PlacedWrapper]:
    """Return the wrappers that hold nothing but a linear, outermost where they nest, in the model's order."""
    outermost: dict[str, str] = {}
    modules = dict(model.named_modules())
    for path, inner in ModelPaths.of(model).inner.items():
        if _holds_only(modules[path], modules[inner]):
            outermost[inner] = min(outermost.get(inner, path), path, key=len)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder in modules.values():
        for name, child in holder._modules.items():
            if child is not None:
                holders.setdefault(id(child), []).append((holder, name))
    return [
        PlacedWrapper(
            path=path,
            wrapper=modules[path],
            inside=inner.removeprefix(f"{path}."),
            holders=tuple(holders[id(modules[path])]),
            dtype=base_layer_of(modules[inner]).weight.dtype,
        )
        for inner, path in outermost.items()
    ]


def _holds_only(wrapper: nn.Module, inner: nn.Module) -> bool:
    """Check whether the linear is all it holds: a norm or an activation beside it makes it no wrapper."""
    own = set(inner.modules())
    beside = (module for module in wrapper.modules() if module not in own)
    return all(len(module._modules) == 1 for module in beside)


def name_inner_linears(model: Any, placed: Iterable[PlacedWrapper]) -> None:
    """Let every adapter's configuration target what carries the adapter, by its name with the wrappers in place.

    The configurations are changed in place, as PEFT does while it attaches: a save under way already holds them.

    Args:
        model: the base model, with its wrappers back.
        placed: the wrappers that were out.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    model_paths = ModelPaths.of(model)
    former = {wrapper.inner_path: wrapper.path for wrapper in placed}
    for adapter_name, config in configs.items():
        _retarget(config, model_paths, adapted_sites(model, adapter_name), former)


def _retarget(config: Any, model_paths: ModelPaths, adapted: set[str], former: Mapping[str, str]) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    planned = [path for path in model_paths.paths if path in adapted]
    if not planned or getattr(config, "target_modules", None) is None:
        return
    matches = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]._check_target_module_exists
    exact = [path for path in model_paths.paths if matches(config, path)] == planned
    aimed = config if exact else retargeted(config, planned, model_paths, matches)
    changed = renamed(aimed, {path: former.get(path, path) for path in planned})
    vars(config).update(vars(changed))
