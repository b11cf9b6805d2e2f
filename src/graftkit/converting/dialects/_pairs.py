"""What vLLM's and SGLang's forms share: PEFT's file names, and one pair of factors for each matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.adapters.file import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from graftkit.adapters.scale import scale_at
from graftkit.converting.delta import Deltas, Factors, Slice
from graftkit.converting.dialects._engine_names import EngineNames
from graftkit.converting.safetensors_file import OutTensor, write_safetensors
from graftkit.errors import AdapterError
from graftkit.files import write_text
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.modeling.unwrapping import PEFT_PREFIX

if TYPE_CHECKING:
    import torch

# (configuration, module) -> scale.
ScaleOf = Callable[[Mapping[str, Any], str], float]
ORIGIN = ("base_model_name_or_path", "revision", "task_type")


@dataclass(frozen=True)
class Pair:
    """One pair of tensors to write.

    Attributes:
        module: the engine's name for the matrix.
        factors: what it holds, with the scale of the configuration that is written beside it.
        embedding: whether the engine takes it for an embedding's.
    """

    module: str
    factors: Factors
    embedding: bool = False

    def tensors(self) -> tuple[OutTensor, OutTensor]:
        """Return A and B as they are written: (r, in) and (out, r)."""
        at = f"{PEFT_PREFIX}{self.module}"
        names = [f"{at}.lora_A.weight", f"{at}.lora_B.weight"]
        if self.embedding:
            names = [f"{at}.lora_embedding_A", f"{at}.lora_embedding_B"]
        factors = self.factors
        (out, ins), rank = factors.shape, factors.rank
        return (
            OutTensor(names[0], factors.dtype, (rank, ins), lambda: factors.read()[0]),
            OutTensor(names[1], factors.dtype, (out, rank), lambda: factors.read()[1]),
        )


@dataclass(frozen=True)
class StackedPair:
    """One pair for all experts of a parameter, as PEFT stacks them.

    Attributes:
        module: the engine's name.
        group: the updates of all experts in order, of one rank and scale.
    """

    module: str
    group: tuple[Factors, ...]

    @property
    def factors(self) -> Factors:
        """Those of the first expert, for rank and scale."""
        return self.group[0]

    def tensors(self) -> tuple[OutTensor, OutTensor]:
        at = f"{PEFT_PREFIX}{self.module}"
        return stacked_tensors((f"{at}.lora_A.weight", f"{at}.lora_B.weight"), self.group)


def stacked_tensors(names: tuple[str, str], group: tuple[Factors, ...]) -> tuple[OutTensor, OutTensor]:
    """Return A (experts * r, in), by expert, and B (out, r * experts), by rank.

    Source: ``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``, which takes them apart.
    """
    first, count = group[0], len(group)
    (out, ins), rank = first.shape, first.rank
    dtype = first.dtype if len({factors.dtype for factors in group}) == 1 else "F32"

    def stacked_a() -> torch.Tensor:
        import torch

        return torch.cat([factors.read()[0] for factors in group])

    def stacked_b() -> torch.Tensor:
        import torch

        return torch.stack([factors.read()[1] for factors in group], 2).flatten(1)

    return (
        OutTensor(names[0], dtype, (count * rank, ins), stacked_a),
        OutTensor(names[1], dtype, (out, rank * count), stacked_b),
    )


def read_expert(
    tensors: AdapterTensors, names: tuple[str, str], rank: int, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A (r, in) and B (out, r) of one expert from the pair of all."""
    a, b = tensors.read_cached(names[0]), tensors.read_cached(names[1])
    return a[number * rank : (number + 1) * rank], b.view(len(b), rank, -1)[:, :, number]


AnyPair = Pair | StackedPair


def write_pairs(pairs: Iterable[AnyPair], origin: Mapping[str, Any], folder: Path) -> None:
    """Write pairs of one scale, and their configuration, as a PEFT folder.

    Args:
        origin: fields of the configuration that say where the adapter comes from.
    """
    every = tuple(pairs)
    config = {**origin, **_config(every)}
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_safetensors(folder / WEIGHTS_NAME, (tensor for pair in every for tensor in pair.tensors()))


def _config(pairs: tuple[AnyPair, ...]) -> dict[str, Any]:
    rank, scale = common_scale(pair.factors for pair in pairs)
    alpha = scale * rank
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({pair.module.rpartition(".")[2] for pair in pairs}),
    }


def pairs_of(deltas: Deltas, names: EngineNames) -> dict[str, AnyPair]:
    """Return the pairs by the engine's modules, all of one scale; of experts, all that a layer has."""
    _, scale = common_scale(deltas)
    found: dict[str, AnyPair] = {}
    stacked = {parameter: module for module, parameter in names.stacked.items()}
    for parameter, every in _whole_groups(deltas, names).items():
        group = _of_one_scale(every, scale, names.base.is_stacked(parameter))
        if parameter in stacked:
            found[stacked[parameter]] = StackedPair(stacked[parameter], group)
            continue
        for one in group:
            for copy in names.copies(one.at):
                for module, part in names.modules(one.moved(copy)):
                    found[module] = Pair(module, part, names.is_embedding(part.at))
    return found


def _of_one_scale(every: tuple[Factors, ...], scale: float, of_experts: bool) -> tuple[Factors, ...]:
    """Return the updates with one scale; those of experts, which engines stack, with one rank, too."""
    widest = max(factors.rank for factors in every)
    return tuple(rescaled(factors, scale, widest if of_experts else factors.rank) for factors in every)


def completed(pairs: Mapping[str, AnyPair], names: EngineNames) -> dict[str, Pair]:
    """Return the pairs with zeros where the engine takes several modules only together, all of one rank."""
    rank, scale = common_scale(pair.factors for pair in pairs.values())
    added = {module: Pair(module, zeros(at, names.shape(at))) for module, at in names.missing(pairs)}
    own = {module: pair for module, pair in pairs.items() if isinstance(pair, Pair)}
    return {
        module: replace(pair, factors=rescaled(pair.factors, scale, rank))
        for module, pair in {**own, **added}.items()
    }


def _whole_groups(deltas: Deltas, names: EngineNames) -> dict[str, tuple[Factors, ...]]:
    """Return the updates by parameter; where one of a layer's experts is adapted, zeros fill up all others.

    Source: ``vllm.lora.lora_weights.PackedLoRALayerWeights.pack_moe`` takes all experts, of one rank a projection.
    """
    groups = deltas.by_parameter()
    holders = {name.rpartition(".")[0] for name in groups if names.base.is_stacked(name)}
    for name in names.base.shapes:
        if name.rpartition(".")[0] in holders and names.base.is_stacked(name):
            given = {factors.at.expert: factors for factors in groups.get(name, ())}
            slices = names.matrices(name)
            groups[name] = tuple(given.get(at.expert) or zeros(at, names.shape(at)) for at in slices)
    return groups


def zeros(at: Slice, shape: tuple[int, int]) -> Factors:
    """Return factors of rank 1 that add nothing to a slice of shape (out, in)."""

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)

    return Factors(at, 1, shape, 1.0, "F32", str(at), read)


@dataclass(frozen=True)
class PairFile:
    """A PEFT folder as an engine reads it: pairs of factors by the names of modules, scaled by the configuration.

    Attributes:
        scale_of: the factor that the engine multiplies a module's update by.
    """

    file: AdapterFile
    scale_of: ScaleOf
    tensors: AdapterTensors = field(repr=False)

    @classmethod
    def open(cls, folder: Path, scale_of: ScaleOf) -> PairFile:
        file = read_adapter(folder)
        return cls(file, scale_of, AdapterTensors(file))

    def read(self, names: EngineNames) -> Deltas:
        """Read every pair.

        Args:
            names: of the engine's modules.

        Raises:
            AdapterError: ``adapter-does-not-fit``: a tensor is not a factor, or lacks the other one; or it has no
                module, or another shape.
        """
        self.tensors.check_not_empty()
        found: list[Factors] = []
        for module, (a, b) in self._pairs().items():
            at = names.slices.get(module)
            if module in names.stacked:
                found += self._experts(module, a, b, names)
                continue
            if at is None:
                raise does_not_fit(self.file, a, f"the engine has no module {module} for this base")
            found.append(self._factors(module, a, b, at, names.shape(at)))
        origin = {name: self.file.config[name] for name in ORIGIN if self.file.config.get(name) is not None}
        return Deltas(tuple(found), (), origin)

    def _pairs(self) -> dict[str, tuple[str, str]]:
        halves: dict[str, dict[str, str]] = {}
        for name in self.file.tensors:
            module, side = _split(name)
            if not module:
                raise does_not_fit(self.file, name, "it is neither A nor B of a LoRA")
            halves.setdefault(module, {})[side] = name
        for sides in halves.values():
            if len(sides) != 2:
                only = next(iter(sides.values()))
                raise does_not_fit(self.file, only, "the other tensor of the pair is missing")
        return {module: (sides["A"], sides["B"]) for module, sides in halves.items()}

    def _factors(self, module: str, a: str, b: str, at: Slice, shape: tuple[int, int]) -> Factors:
        shapes = self.tensors.shapes
        out, ins = shape
        rank = shapes[a][0]
        if shapes[a] != (rank, ins) or shapes[b] != (out, rank):
            why = f"{list(shapes[a])} and {list(shapes[b])} do not make {[out, ins]}"
            raise does_not_fit(self.file, a, why)
        return Factors(
            at=at,
            rank=rank,
            shape=(out, ins),
            scale=self.scale_of(self.file.config, module),
            dtype=self.file.tensors[b].dtype,
            name=b,
            read=partial(self._read, a, b),
        )

    def _experts(self, module: str, a: str, b: str, names: EngineNames) -> Iterator[Factors]:
        """Yield the update of each expert of a pair that stacks them."""
        every = names.matrices(names.stacked[module])
        out, ins = names.shape(every[0])
        shapes, count = self.tensors.shapes, len(every)
        rank = shapes[a][0] // count
        if shapes[a] != (rank * count, ins) or shapes[b] != (out, rank * count) or not rank:
            why = f"{list(shapes[a])} and {list(shapes[b])} do not make {count} times {[out, ins]}"
            raise does_not_fit(self.file, a, why)
        # The patterns name the parameter. Source: ``vllm.lora.peft_helper.PEFTHelper.get_rank_and_scaling``.
        scale = self.scale_of(self.file.config, names.stacked[module])
        for number, at in enumerate(every):
            read = partial(read_expert, self.tensors, (a, b), rank, number)
            yield Factors(at, rank, (out, ins), scale, self.file.tensors[b].dtype, b, read)

    def _read(self, a: str, b: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors.read_cached(a), self.tensors.read_cached(b)


_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}


def _split(name: str) -> tuple[str, str]:
    """Return the module and the side of a tensor's name; empty where it is not a factor."""
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if end is None or not name.startswith(PEFT_PREFIX):
        return "", ""
    return name.removeprefix(PEFT_PREFIX).removesuffix(end), _ENDS[end]


def does_not_fit(file: AdapterFile, where: str, why: str) -> AdapterError:
    """Return the error for a tensor that the engine has no place for."""
    return AdapterError(
        "a tensor of the adapter fits nothing in this base",
        where=where,
        why=why,
        help=f"name the base that {file.folder} was made for, and the engine that it was converted for",
        code="adapter-does-not-fit",
    )


def patterned_scale(config: Mapping[str, Any], module: str) -> float:
    """Return the scale of an engine that honours patterns and rsLoRA; the rank is the configuration's, as in PEFT.

    Source: ``vllm.lora.peft_helper.PEFTHelper.get_rank_and_scaling``.
    """
    return scale_at(config, module)


def one_scale(config: Mapping[str, Any], module: str) -> float:
    """Return the one scale of an engine that reads ``lora_alpha`` and ``r`` alone."""
    return scale_at({name: config[name] for name in ("lora_alpha", "r") if name in config}, module)


def common_scale(factors: Iterable[Factors]) -> tuple[int, float]:
    """Return the largest rank, and the scale that most updates have (1 where that is 0)."""
    every = list(factors)
    scales = [f.scale for f in every]
    most = max(dict.fromkeys(scales), key=scales.count)
    return max(f.rank for f in every), most or 1.0


def rescaled(factors: Factors, scale: float, rank: int) -> Factors:
    """Return the same update with another scale, and a rank that zeros fill up.

    B then carries the ratio of the scales. It is kept in single precision unless it is a power of two, which moves
    no digit of it.
    """
    ratio = factors.scale / scale
    dtype = factors.dtype if _is_power_of_two(ratio) else "F32"

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        a, b = factors.read()
        missing = rank - factors.rank
        b = b if ratio == 1 else b.double() * ratio
        return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))

    if ratio == 1 and rank == factors.rank:
        return factors
    return replace(factors, scale=scale, rank=rank, dtype=dtype, read=read)


def _is_power_of_two(number: float) -> bool:
    return number > 0 and math.frexp(number)[0] == 0.5
