"""What an adapter adds to each matrix of its base, as low-rank factors: the form that all dialects share.

Headers alone tell where an update goes, its rank and its shape; the factors are read one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.engines import Feature

if TYPE_CHECKING:
    import torch

# Reads A (r, in) and B (out, r), in their stored dtype.
ReadPair = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Slice:
    """One matrix of the base, or some of its outputs.

    Attributes:
        parameter: its name in transformers' model: "model.layers.0.mlp.experts.gate_up_proj".
        expert: the index of the matrix in a stacked parameter; None for one that is a single matrix.
        outs: the outputs, where it is not all of them (the gate in a fused gate and up projection).
        copy: of a weight that an engine holds more than once, the further copy's leaf name: "v_proj" where the
            keys are the values too. Empty for the base's own.
    """

    parameter: str
    expert: int | None = None
    outs: range | None = None
    copy: str = ""

    def __str__(self) -> str:
        parts = [self.parameter]
        parts += [f"expert {self.expert}"] if self.expert is not None else []
        parts += [f"outputs {self.outs.start}:{self.outs.stop}:{self.outs.step}"] if self.outs is not None else []
        return ", ".join([*parts, *([f"as {self.copy}"] if self.copy else [])])

    @property
    def whole(self) -> Slice:
        """The base's own matrix that it is a part, or a copy, of."""
        return Slice(self.parameter, self.expert)


@dataclass(frozen=True)
class Factors:
    """The update of one slice: ``scale * B @ A``, (out, in), oriented as ``nn.Linear``'s weight.

    An embedding counts as a linear from one-hot tokens: A is (r, tokens), B is (width, r).

    Attributes:
        at: what it is added to.
        rank: r.
        shape: (out, in) of the slice.
        scale: as a double; not yet in A or B.
        dtype: safetensors' name of the dtype that A and B are stored in: "BF16".
        name: the tensor, or the module, that it was read from, for messages.
        read: reads A (r, in) and B (out, r).
    """

    at: Slice
    rank: int
    shape: tuple[int, int]
    scale: float
    dtype: str
    name: str
    read: ReadPair = field(repr=False, compare=False)

    def cut(self, outs: range) -> Factors:
        """Return the part for some of the slice's outputs, counted within the slice; A stays whole."""
        own = range(self.shape[0]) if self.at.outs is None else self.at.outs

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            a, b = self.read()
            return a, b[outs.start : outs.stop : outs.step]

        at = replace(self.at, outs=own[outs.start : outs.stop : outs.step])
        return replace(self, at=at, shape=(len(outs), self.shape[1]), read=read)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A and B as doubles, with the scale in B: their product is the update."""
        a, b = self.read()
        return a.double(), b.double() * self.scale

    def moved(self, at: Slice) -> Factors:
        """Return the same update at another slice of the same shape."""
        return replace(self, at=at)


@dataclass(frozen=True)
class Other:
    """Something in an adapter that is not a product of two matrices.

    Attributes:
        feature: what it is.
        name: the parameter that it changes, or the field of the configuration that asks for it.
    """

    feature: Feature
    name: str


@dataclass(frozen=True)
class Deltas:
    """Everything that one adapter does to its base.

    Attributes:
        factors: the low-rank updates, in the order of the file; a slice has one, and no two overlap.
        others: what is not a low-rank update.
        config: fields of a PEFT configuration that say where the adapter comes from, as far as its dialect keeps
            them: ``base_model_name_or_path``, ``revision``, ``task_type``.
    """

    factors: tuple[Factors, ...]
    others: tuple[Other, ...] = ()
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __iter__(self) -> Iterator[Factors]:
        return iter(self.factors)

    def by_parameter(self) -> dict[str, tuple[Factors, ...]]:
        """Return the updates by the parameter that they change: of a stacked one, those of its experts."""
        found: dict[str, list[Factors]] = {}
        for factors in self.factors:
            found.setdefault(factors.at.parameter, []).append(factors)
        return {name: tuple(several) for name, several in found.items()}
