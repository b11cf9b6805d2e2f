"""The modules of vLLM and SGLang by name, and what of the base each of them is.

Both name the parts of a layer as the published checkpoint does: where transformers stacks or renames on loading,
the checkpoint's names count. What comes before a layer's number stays as the model's class has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Factors, Slice
from graftkit.surveying import kinds

_LAYER = re.compile(r"^(.*?\.\d+\.)(.*)$")
_WEIGHT = ".weight"
# A fused projection's leaf -> those of its halves, in their order.
_HALVES: Mapping[str, tuple[str, str]] = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class EngineNames:
    """The names of one base's matrices in an engine."""

    base: ConvertBase

    def copies(self, at: Slice) -> tuple[Slice, ...]:
        """Return where the engine holds a weight: its own place, and as values where the keys are those too."""
        if not self.base.makes_values(at.parameter):
            return (at,)
        leaf = at.parameter.removesuffix(_WEIGHT).rpartition(".")[2]
        return (at, replace(at, copy=f"v{leaf[1:]}"))

    def is_embedding(self, at: Slice) -> bool:
        site = self.base.site(at.parameter)
        return site is not None and site.kind == kinds.EMBEDDING

    def modules(self, factors: Factors) -> Iterator[tuple[str, Factors]]:
        """Yield the engine's modules for an update of a whole matrix, each with its part."""
        for name, at in self.parts(factors.at):
            yield name, factors if at.outs is None else factors.cut(at.outs)

    def parts(self, at: Slice) -> tuple[tuple[str, Slice], ...]:
        """Return the engine's modules that make up a matrix of the base, each with its part."""
        module = at.parameter.removesuffix(_WEIGHT)
        if at.copy:
            return ((f"{module.rpartition('.')[0]}.{at.copy}", at),)
        stored = [(name, part) for name, part in self._alone.get(at.parameter, ()) if part.expert == at.expert]
        if stored:
            return tuple((_inside_layer(module, name.removesuffix(_WEIGHT)), part) for name, part in stored)
        if at.expert is None:
            return ((module, at),)
        holder, _, leaf = module.rpartition(".")
        return tuple((f"{holder}.{at.expert}.{own}", part) for own, part in self._halves(leaf, at))

    def _halves(self, leaf: str, at: Slice) -> Iterator[tuple[str, Slice]]:
        if leaf not in _HALVES:
            yield leaf, at
            return
        half = self.base.matrix(at.parameter)[0] // 2
        for number, own in enumerate(_HALVES[leaf]):
            yield own, replace(at, outs=range(number * half, (number + 1) * half))

    @cached_property
    def _alone(self) -> Mapping[str, tuple[tuple[str, Slice], ...]]:
        """Parameter -> the checkpoint's tensors that hold nothing but one slice of it."""
        held = self.base.on_disk
        return {
            parameter: tuple((name, at) for name, at in parts if len(held[name]) == 1)
            for parameter, parts in self.base.disk_names.items()
            if all(len(held[name]) == 1 for name, _ in parts)
        }

    @cached_property
    def slices(self) -> Mapping[str, Slice]:
        """The engine's module -> what of the base it is, for every module that an adapter could name."""
        found: dict[str, Slice] = {}
        for site in self.base.model_map:
            parameter = site.path if site.path in self.base.shapes else f"{site.path}{_WEIGHT}"
            if parameter not in self.base.shapes:
                continue
            for at in self.matrices(parameter):
                for copy in self.copies(at):
                    found.update(self.parts(copy))
        return found

    def matrices(self, parameter: str) -> tuple[Slice, ...]:
        """Return the matrices of a parameter: one, or one for each expert."""
        if not self.base.is_stacked(parameter):
            return (Slice(parameter),)
        return tuple(Slice(parameter, number) for number in range(self.base.shapes[parameter][0]))


def _inside_layer(module: str, stored: str) -> str:
    """Return the checkpoint's name of a module, with the model's own path to the layer."""
    own, other = _LAYER.match(module), _LAYER.match(stored)
    if own is None or other is None:
        return module
    return f"{own[1]}{other[2]}"
