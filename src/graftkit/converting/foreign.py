"""Adapters under names or in layouts that stock PEFT does not load on this base: read by what their tensors are.

Four layouts are known beside a plain pair of factors, each recognised by its names and shapes:

- one pair an expert, by the published checkpoint's names (transformers 4; exports of NeMo AutoModel and of
  Megatron Bridge): ``experts.0.w1.lora_A.weight``;
- all experts of a projection stacked, one of the factors perhaps shared (Tinker:
  ``tinker_cookbook/weights/_adapter.py``): ``experts.w1.lora_A.weight`` (experts or 1, r, in);
- all experts of a layer stacked, inputs first (NeMo AutoModel:
  ``nemo_automodel/components/moe/state_dict_mixin.py``): ``experts.lora_gate_and_up_A`` (experts, in, r),
  ``experts.lora_down_B`` (experts, r, out);
- PEFT's pair for stacked experts, as it is now or with inputs and outputs exchanged, as older versions wrote it
  where a matrix is (out, in): ``experts.lora_A.weight`` (experts * r, out), ``experts.lora_B.weight``
  (in, r * experts).

A module is found by its name in transformers' model or in the published checkpoint, whatever class it was saved
from: what comes before the layers differs between a text model and the same one inside a multimodal one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.adapters.expert_layout import UNKNOWN_HELP, UNKNOWN_WHY, ExpertLayout, expert_layout
from graftkit.adapters.file import AdapterFile
from graftkit.adapters.scale import rank_at, scale_at
from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, ReadPair, Slice
from graftkit.converting.stacks import halves, stored_slices
from graftkit.errors import AdapterError
from graftkit.merging.adapter.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

# What a name may begin with before the part that all classes share.
_OUTER = frozenset({"base_model", "model", "language_model"})
_WEIGHT = ".weight"
_ENDS: Mapping[str, str] = MappingProxyType(
    {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_A.default.weight": "A",
        ".lora_B.default.weight": "B",
        ".lora_embedding_A": "A",
        ".lora_embedding_B": "B",
        ".lora_gate_and_up_A": "A",
        ".lora_gate_and_up_B": "B",
        ".lora_down_A": "A",
        ".lora_down_B": "B",
    }
)
_INPUTS_FIRST: Mapping[str, str] = MappingProxyType(
    {".lora_gate_and_up_A": "gate_up_proj", ".lora_down_A": "down_proj"}
)
# A projection of an expert has these names in the checkpoints of different families.
_LEAVES: Mapping[str, str] = MappingProxyType({"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"})
_EXPERTS = re.compile(r"(?P<layer>.*?\.\d+)\..*\bexperts")
_ONE = re.compile(r"(?P<holder>.*\bexperts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
_ALL = re.compile(r"(?P<holder>.*\bexperts)\.(?P<leaf>\w+)")
_WRAPPED = re.compile(r"(?P<holder>.*\bexperts)(?P<inner>\.base_layer)?")
# Fields of a configuration with which an update is not a product of two matrices, or depends on the base.
_NO_PRODUCT = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "alora_invocation_tokens")
_ORIGIN = ("base_model_name_or_path", "revision", "task_type")


def can_be_foreign(file: AdapterFile) -> bool:
    """Check whether an adapter's configuration asks for plain LoRA, and all of its tensors are factors."""
    plain = not any(file.config.get(name) for name in _NO_PRODUCT)
    fresh = file.config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    return file.peft_type == "LORA" and plain and fresh and all(_end(name) for name in file.tensors)


def read_foreign(file: AdapterFile, base: ConvertBase) -> Deltas:
    """Read an adapter by its tensors' names and shapes alone; its targets are not consulted.

    Args:
        file: one that :func:`can_be_foreign`.

    Raises:
        AdapterError: ``adapter-does-not-fit``: a tensor has no place in the base, or more than one.
    """
    reader = _Reader(file, AdapterTensors(file), _Names(base))
    reader.tensors.check_not_empty()
    factors = [one for pair in reader.pairs() for one in reader.factors(pair)]
    origin = {name: file.config[name] for name in _ORIGIN if file.config.get(name) is not None}
    return Deltas(tuple(factors), config=MappingProxyType(origin))


def _end(name: str) -> str:
    return next((end for end in _ENDS if name.endswith(end)), "")


def _shared_name(name: str) -> str:
    """Return what of a module's name all classes that hold it have in common."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    return ".".join(parts)


@dataclass(frozen=True)
class _Pair:
    """Two tensors of the file.

    Attributes:
        module: what stands before the names' endings.
        a, b: names.
        end: the ending of A's name.
    """

    module: str
    a: str
    b: str
    end: str


@dataclass(frozen=True)
class _Way:
    """How PEFT's pair of all experts can be read.

    Attributes:
        parameter: what it changes.
        exchanged: whether A has the outputs, and B the inputs.
    """

    parameter: str
    experts: int
    rank: int
    exchanged: bool


@dataclass(frozen=True)
class _Names:
    """The base's matrices, by the names under which adapters know them."""

    base: ConvertBase

    @cached_property
    def single(self) -> Mapping[str, Slice | None]:
        """Shared name -> a matrix that is not an expert's; None where two have it."""
        found: dict[str, set[Slice]] = {}
        for stored, at in self._stored:
            if at.expert is None:
                for name in (stored, at.parameter.removesuffix(_WEIGHT)):
                    found.setdefault(_shared_name(name), set()).add(at)
        return {name: next(iter(places)) if len(places) == 1 else None for name, places in found.items()}

    @cached_property
    def experts(self) -> Mapping[tuple[str, str], Mapping[int, Slice]]:
        """(layer, projection) -> the matrices of its experts, by number."""
        found: dict[tuple[str, str], dict[int, Slice]] = {}
        for stored, at in self._stored:
            if at.expert is None:
                continue
            for leaf, part in self._projections(stored.rpartition(".")[2], at):
                found.setdefault((_layer(stored), leaf), {})[at.expert] = part
        return found

    @cached_property
    def stacked(self) -> Mapping[tuple[str, str], tuple[str, int]]:
        """(layer, projection) -> the stacked parameter, and its number of experts."""
        found = {}
        for at in {at.parameter: at for _, at in self._stored if at.expert is not None}.values():
            leaf = at.parameter.rpartition(".")[2]
            found[_layer(at.parameter), leaf] = (at.parameter, self.base.shapes[at.parameter][0])
        return found

    @cached_property
    def _stored(self) -> tuple[tuple[str, Slice], ...]:
        return tuple(stored_slices(self.base))

    def _projections(self, leaf: str, at: Slice) -> Iterator[tuple[str, Slice]]:
        if leaf == "gate_up_proj" and at.outs is None:
            yield from zip(("gate_proj", "up_proj"), halves(at, self.base), strict=True)
        else:
            yield _LEAVES.get(leaf, leaf), at

    def shape(self, at: Slice) -> tuple[int, int]:
        outs, ins = self.base.matrix(at.parameter)
        return (outs if at.outs is None else len(at.outs), ins)


def _layer(name: str) -> str:
    """Return the name of the layer that holds experts: "layers.0"."""
    found = _EXPERTS.match(_shared_name(name))
    return found["layer"] if found is not None else name


@dataclass(frozen=True)
class _Reader:
    file: AdapterFile
    tensors: AdapterTensors = field(repr=False)
    names: _Names = field(repr=False)

    def pairs(self) -> list[_Pair]:
        sides: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
        for name in self.file.tensors:
            end = _end(name)
            kind = end.replace("_B", "_A") if _ENDS[end] == "B" else end
            sides.setdefault((name.removesuffix(end), kind), {})[_ENDS[end]] = (name, end)
        for (module, _), side in sides.items():
            if len(side) != 2:
                raise self._does_not_fit(module, "it has only one of A and B")
        return [_Pair(module, side["A"][0], side["B"][0], kind) for (module, kind), side in sides.items()]

    def factors(self, pair: _Pair) -> Iterator[Factors]:
        """Yield what a pair adds, by the first layout whose names and shapes it has."""
        name = _shared_name(pair.module)
        ndim = len(self.tensors.shapes[pair.a]), len(self.tensors.shapes[pair.b])
        one, every, wrapped = _ONE.fullmatch(name), _ALL.fullmatch(name), _WRAPPED.fullmatch(name)
        if pair.end in _INPUTS_FIRST and ndim == (3, 3):
            yield from self._inputs_first(pair)
        elif ndim == (3, 3) and every is not None:
            yield from self._stacked(pair, every)
        elif ndim == (2, 2) and wrapped is not None:
            yield from self._wrapped(pair)
        elif ndim == (2, 2) and one is not None:
            leaf = _LEAVES.get(one["leaf"], one["leaf"])
            at = self.names.experts.get((_layer(name), leaf), {}).get(int(one["number"]))
            yield self._plain(pair, at)
        elif ndim == (2, 2):
            yield self._plain(pair, self.names.single.get(self._known(name)))
        else:
            raise self._does_not_fit(pair.a, "no tool is known that gives its factors these names and shapes")

    def _known(self, name: str) -> str:
        """Return a module's name as the base has it, where the training tool has a name of its own for it."""
        if name in self.names.single:
            return name
        return {"unembed_tokens": "lm_head"}.get(name, name.replace(".attn.", ".self_attn."))

    def _plain(self, pair: _Pair, at: Slice | None) -> Factors:
        if at is None:
            raise self._does_not_fit(pair.a, "the base has no such module, or several that could be meant")
        self._check_shapes(pair, at)
        return self._made(pair, at, self.tensors.shapes[pair.b][-1], self._read_plain(pair))

    def _stacked(self, pair: _Pair, module: re.Match[str]) -> Iterator[Factors]:
        leaf = _LEAVES.get(module["leaf"], module["leaf"])
        experts = self.names.experts.get((_layer(module.string), leaf), {})
        counts = {self.tensors.shapes[name][0] for name in (pair.a, pair.b)}
        if not experts or not counts <= {1, len(experts)}:
            raise self._does_not_fit(pair.a, f"the base has {len(experts)} experts there")
        for number, at in experts.items():
            self._check_shapes(pair, at)
            read = self._read_rows(pair, number, inputs_first=False)
            yield self._made(pair, at, self.tensors.shapes[pair.b][-1], read)

    def _inputs_first(self, pair: _Pair) -> Iterator[Factors]:
        leaf = _INPUTS_FIRST[pair.end]
        parameter, count = self.names.stacked.get((_layer(f"{pair.module}.{leaf}"), leaf), ("", 0))
        shapes = self.tensors.shapes
        if not parameter or shapes[pair.a][0] != count or shapes[pair.b][0] != count:
            raise self._does_not_fit(pair.a, f"the base has {count} experts there")
        if not self._is_concatenated(parameter):
            raise self._does_not_fit(pair.a, "the base has gate and up in turn, and this tool one after the other")
        self._check_shapes(pair, Slice(parameter))
        for number in range(count):
            read = self._read_rows(pair, number, inputs_first=True)
            yield self._made(pair, Slice(parameter, number), shapes[pair.b][1], read)

    def _is_concatenated(self, parameter: str) -> bool:
        experts = self.names.base.model.get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(experts, "is_concatenated", True))

    def _wrapped(self, pair: _Pair) -> Iterator[Factors]:
        """Read PEFT's pair of all experts: each product is the update, or its transpose."""
        ways = self._ways(pair)
        if len(ways) > 1:
            # A square matrix: the file has the other pairs in one way, or nothing tells.
            ways = [way for way in ways if way.exchanged in self._ways_of_the_file]
        if len(ways) != 1 or len(self._ways_of_the_file) > 1:
            raise self._does_not_fit(pair.a, "its shape fits none of the layer's stacked experts, or several")
        way = ways[0]
        if way.rank > 1 and expert_layout(self.file.config) is ExpertLayout.UNKNOWN:
            raise self._does_not_fit(pair.b, UNKNOWN_WHY, UNKNOWN_HELP)
        for number in range(way.experts):
            yield self._made(pair, Slice(way.parameter, number), way.rank, self._read_wrapped(pair, number, way))

    @property
    def _by_expert(self) -> bool:
        return expert_layout(self.file.config) is ExpertLayout.BY_EXPERT

    @cached_property
    def _ways_of_the_file(self) -> frozenset[bool]:
        """Whether inputs and outputs are exchanged, by the pairs whose shapes tell."""
        found = (self._ways(pair) for pair in self.pairs() if _WRAPPED.fullmatch(_shared_name(pair.module)))
        return frozenset(ways[0].exchanged for ways in found if len({way.exchanged for way in ways}) == 1)

    def _ways(self, pair: _Pair) -> list[_Way]:
        """Return how a pair of all experts can be read."""
        a, b = self.tensors.shapes[pair.a], self.tensors.shapes[pair.b]
        layer, found = _layer(f"{pair.module}."), []
        for (holder, _), (parameter, count) in self.names.stacked.items():
            if holder != layer or a[0] != b[1] or a[0] % count:
                continue
            outs, ins = self.names.base.matrix(parameter)
            ways = {False: (ins, outs), True: (outs, ins)}
            found += [
                _Way(parameter, count, a[0] // count, way) for way, ends in ways.items() if ends == (a[1], b[0])
            ]
        return found

    def _made(self, pair: _Pair, at: Slice, rank: int, read: ReadPair) -> Factors:
        shape = self.names.shape(at)
        expected = rank_at(self.file.config, pair.module)
        if rank != expected:
            raise self._does_not_fit(pair.a, f"its rank is {rank}, and the configuration says {expected}")
        dtype = self.file.tensors[pair.b].dtype
        return Factors(at, rank, shape, scale_at(self.file.config, pair.module), dtype, pair.b, read)

    def _check_shapes(self, pair: _Pair, at: Slice) -> None:
        """Check that A and B of one matrix make the matrix."""
        a, b = (self.tensors.shapes[name][-2:] for name in (pair.a, pair.b))
        if pair.end in _INPUTS_FIRST:
            a, b = a[::-1], b[::-1]
        if (b[0], a[1]) != self.names.shape(at) or a[0] != b[1]:
            raise self._does_not_fit(pair.a, f"{list(a)} and {list(b)} do not make {list(self.names.shape(at))}")

    def _read_plain(self, pair: _Pair) -> ReadPair:
        return lambda: (self.tensors.read(pair.a), self.tensors.read(pair.b))

    def _read_rows(self, pair: _Pair, number: int, *, inputs_first: bool) -> ReadPair:
        def read() -> tuple[torch.Tensor, torch.Tensor]:
            a, b = (self._row(name, number) for name in (pair.a, pair.b))
            return (a.T, b.T) if inputs_first else (a, b)

        return read

    def _row(self, name: str, number: int) -> torch.Tensor:
        """Read one expert's factor; the only one, where all share it."""
        at = number if self.tensors.shapes[name][0] > 1 else 0
        return self.tensors.rows(name, at, at + 1)[0]

    def _read_wrapped(self, pair: _Pair, number: int, way: _Way) -> ReadPair:
        def read() -> tuple[torch.Tensor, torch.Tensor]:
            a = self.tensors.rows(pair.a, number * way.rank, (number + 1) * way.rank)
            b = self.tensors.read_cached(pair.b)
            # Source: ``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``: A by expert, B by rank.
            if self._by_expert:
                b = b[:, number * way.rank : (number + 1) * way.rank]
            else:
                b = b.view(len(b), way.rank, -1)[:, :, number]
            return (b.T, a.T) if way.exchanged else (a, b)

        return read

    def _does_not_fit(self, tensor: str, why: str, help: str = "name the base it was trained on") -> AdapterError:
        return AdapterError(
            "a tensor of the adapter fits nothing in this base",
            where=f"{self.file.weights_path}: {tensor}",
            why=why,
            help=help,
            code="adapter-does-not-fit",
        )
