"""A model's modules by path: what each takes in, what it gives out, and what its forward is called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.surveying.kinds import CONV, EMBEDDING, LINEAR, MULTIHEAD, TRANSPOSED, kind_of
from graftkit.surveying.quantized import features_of

if TYPE_CHECKING:
    from torch import nn

NORM = "norm"  # a module that only has a vector as weight


@dataclass(frozen=True, slots=True)
class Layer:
    """One module with a weight.

    Attributes:
        kind: as ``Site.kind``, or "norm".
        into: the width it takes in; None for an embedding, which takes numbers of rows.
        out: the width it gives out.
    """

    path: str
    module: Any
    kind: str
    into: int | None
    out: int


@dataclass(frozen=True)
class Modules:
    """The modules of one model, in the order in which they were registered, without PEFT's layers."""

    by_path: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Modules:
        return cls(dict(_walk("", model, set())))

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The modules that have a weight."""
        found = ((path, _layer(path, module)) for path, module in self.by_path.items())
        return {path: layer for path, layer in found if layer is not None}

    @cached_property
    def emitted(self) -> frozenset[int]:
        """Every width that some layer gives out."""
        return frozenset(layer.out for layer in self.layers.values())

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {path: [] for path in self.by_path}
        for path in self.by_path:
            if path:
                children[path.rpartition(".")[0]].append(path)
        return children

    @cached_property
    def _inside(self) -> dict[str, list[Layer]]:
        inside: dict[str, list[Layer]] = {}
        for path, layer in self.layers.items():
            for at in (path, *ancestors(path)):
                inside.setdefault(at, []).append(layer)
        return inside

    def children(self, path: str) -> list[str]:
        """Return the paths of a module's own children."""
        return self._children[path]

    def inside(self, path: str) -> list[Layer]:
        """Return the layers at and below a path."""
        return self._inside.get(path, [])

    def is_stack(self, path: str) -> bool:
        """Check whether a module is, or holds, a list of blocks that follow each other."""
        from torch import nn

        children = self.children(path)
        types = {type(self.by_path[child]) for child in children if self.children(child)}
        listed = isinstance(self.by_path[path], nn.ModuleList | nn.Sequential) and len(types) == 1
        return (listed and bool(self.inside(path))) or any(self.is_stack(child) for child in children)

    def takes(self, path: str) -> int | None:
        """Return the width that a module takes in: its first layer's, or in a list of blocks their norms'."""
        if path in self.layers:
            layer = self.layers[path]
            return layer.out if layer.into is None else layer.into
        inner = next((child for child in self.children(path) if self.inside(child)), None)
        if inner is None:
            return None
        norms = [at for at in self.children(path) if at in self.layers and self.layers[at].kind == NORM]
        in_list = path.rpartition(".")[2].isdigit()
        return self.layers[norms[0]].out if in_list and norms else self.takes(inner)

    def gives(self, path: str) -> int | None:
        """Return the width that the last layer of a module gives out."""
        layers = self.inside(path)
        return layers[-1].out if layers else None

    def arguments(self, path: str) -> dict[str, bool]:
        """Return what a module's forward takes: name -> whether it must be given; nothing for torch's own."""
        cls = type(self.by_path[path])
        if cls.__module__.partition(".")[0] == "torch" or not inspect.isfunction(cls.forward):
            return {}
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
        named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        return {p.name: p.default is p.empty for p in named}


def is_inside(path: str, outer: str) -> bool:
    """Check whether a module is the outer one or lies in it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def ancestors(path: str) -> Iterator[str]:
    """Yield the paths above a path, the nearest first; the root, "", is the last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _walk(path: str, module: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once, passing over what PEFT put around a layer or beside it."""
    while (original := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = original
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module.named_children():
        yield from _walk(f"{path}.{name}" if path else name, child, seen)


def _layer(path: str, module: Any) -> Layer | None:
    kind = kind_of(module)
    if kind in {LINEAR, TRANSPOSED} and (features := features_of(module)) is not None:
        return Layer(path, module, LINEAR, features[1], features[0])
    if kind == TRANSPOSED:
        return Layer(path, module, LINEAR, *module.weight.shape)
    if kind == MULTIHEAD:
        return Layer(path, module, MULTIHEAD, module.embed_dim, module.embed_dim)
    if kind == CONV:
        return Layer(path, module, CONV, module.in_channels, module.out_channels)
    if kind == EMBEDDING:
        return Layer(path, module, EMBEDDING, None, module.embedding_dim)
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "ndim", 0) == 1:
        return Layer(path, module, NORM, len(weight), len(weight))
    return None
