"""The modules of vLLM and SGLang by name, and what of the base each of them is.

Both name the parts of a layer as the published checkpoint does: where transformers stacks or renames on loading,
the checkpoint's names count. What comes before a layer's number stays as the model's class has it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Factors, Slice
from graftkit.surveying import kinds

_LAYER = re.compile(r"^(.*?\.\d+\.)(.*)$")
_WEIGHT = ".weight"
# A fused projection's leaf -> those of its halves, in their order.
_HALVES: Mapping[str, tuple[str, str]] = {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class EngineNames:
    """The names of one base's matrices in an engine.

    Attributes:
        leaves: the checkpoint's last part of a name -> the engine's, where that is another.
        groups: last parts of names that the engine fuses, and takes only together.
        stacks: parameters whose experts the engine takes in one pair, as PEFT stacks them.
    """

    base: ConvertBase
    leaves: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups: tuple[tuple[str, ...], ...] = ()
    stacks: frozenset[str] = frozenset()

    def copies(self, at: Slice) -> tuple[Slice, ...]:
        """Return where the engine holds a weight: its own place, and as values where the keys are those too."""
        if not self.base.makes_values(at.parameter):
            return (at,)
        leaf = at.parameter.removesuffix(_WEIGHT).rpartition(".")[2]
        return (at, replace(at, copy=f"v{leaf[1:]}"))

    def is_embedding(self, at: Slice) -> bool:
        """Check whether a slice is an embedding's."""
        site = self.base.site(at.parameter) if at.parameter in self.base.shapes else None
        return site is not None and site.kind == kinds.EMBEDDING

    def shape(self, at: Slice) -> tuple[int, int]:
        """Return (out, in) of a slice, or of a projection that only the engine has."""
        out, ins = self._only_here.get(at.parameter) or self.base.matrix(at.parameter)
        return (out if at.outs is None else len(at.outs)), ins

    def modules(self, factors: Factors) -> Iterator[tuple[str, Factors]]:
        """Yield the engine's modules for an update of a whole matrix, each with its part."""
        for name, at in self.parts(factors.at):
            yield name, factors if at.outs is None else factors.cut(at.outs)

    def parts(self, at: Slice) -> tuple[tuple[str, Slice], ...]:
        """Return the engine's modules that make up a matrix of the base, each with its part."""
        return tuple((self._renamed(name), part) for name, part in self._parts(at))

    def _parts(self, at: Slice) -> tuple[tuple[str, Slice], ...]:
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

    def _renamed(self, module: str) -> str:
        holder, _, leaf = module.rpartition(".")
        return f"{holder}.{self.leaves[leaf]}" if leaf in self.leaves else module

    @cached_property
    def _alone(self) -> Mapping[str, tuple[tuple[str, Slice], ...]]:
        """Parameter -> the checkpoint's tensors that hold nothing but one slice of it."""
        held = self.base.on_disk
        return {
            parameter: parts
            for parameter, parts in self.base.disk_names.items()
            if all(len(held[name]) == 1 for name, _ in parts)
        }

    @cached_property
    def slices(self) -> Mapping[str, Slice]:
        """The engine's module -> what of the base it is, for every module that an adapter could name."""
        own = self._of_base
        return {**own, **{name.removesuffix(_WEIGHT): Slice(name) for name in self._only_here}}

    @cached_property
    def _of_base(self) -> dict[str, Slice]:
        found: dict[str, Slice] = {}
        for site in self.base.model_map:
            parameter = site.path if site.path in self.base.shapes else f"{site.path}{_WEIGHT}"
            if parameter in self.base.shapes and parameter not in self.stacks:
                for at in self.matrices(parameter):
                    for copy in self.copies(at):
                        found.update(self.parts(copy))
        return found

    @cached_property
    def stacked(self) -> Mapping[str, str]:
        """The engine's module -> the parameter whose experts it holds in one pair.

        PEFT wraps the projection back into the model's width last: its pair has the module's own name.
        Source: ``vllm/lora/model_manager.py``, ``_stack_moe_lora_weights``.
        """
        found = {}
        for parameter in self.stacks:
            holder, _, leaf = parameter.rpartition(".")
            found[f"{holder}.base_layer" if leaf in _HALVES else holder] = parameter
        return found

    def matrices(self, parameter: str) -> tuple[Slice, ...]:
        """Return the matrices of a parameter: one, or one for each expert."""
        if not self.base.is_stacked(parameter):
            return (Slice(parameter),)
        return tuple(Slice(parameter, number) for number in range(self.base.shapes[parameter][0]))

    def missing(self, modules: Mapping[str, object]) -> Iterator[tuple[str, Slice]]:
        """Yield the modules that complete the groups of which some modules are given."""
        for name in modules:
            for other in self._group_of(name):
                if other not in modules and other in self.slices:
                    yield other, self.slices[other]

    def _group_of(self, module: str) -> tuple[str, ...]:
        holder, _, leaf = module.rpartition(".")
        return tuple(f"{holder}.{other}" for group in self.groups if leaf in group for other in group)

    @cached_property
    def _only_here(self) -> Mapping[str, tuple[int, int]]:
        """Projections that the engine has and the base does not -> their shapes: those of another layer like it.

        Where a layer reads the keys and values of another, the engine still fuses its query with both.
        """
        own = self._of_base
        shapes: dict[tuple[str, tuple[int, int], str], tuple[int, int]] = {}
        lone: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, at in own.items():
            leaf = name.rpartition(".")[2]
            for other in self._group_of(name):
                key = (leaf, self.base.matrix(at.parameter), other.rpartition(".")[2])
                if other in own:
                    shapes.setdefault(key, self.base.matrix(own[other].parameter))
                else:
                    lone[other].append((name, leaf))
        found = {}
        for other, beside in lone.items():
            keys = [
                (leaf, self.base.matrix(own[name].parameter), other.rpartition(".")[2]) for name, leaf in beside
            ]
            shape = next((shapes[key] for key in keys if key in shapes), None)
            if shape is not None:
                found[f"{other}{_WEIGHT}"] = shape
        return found


def _inside_layer(module: str, stored: str) -> str:
    """Return the checkpoint's name of a module, with the model's own path to the layer."""
    own, other = _LAYER.match(module), _LAYER.match(stored)
    if own is None or other is None:
        return module
    return f"{own[1]}{other[2]}"
