"""What an adapter does to one parameter, by the names of the tensors it does it with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LowRank:
    """``W + scale * B @ A``, in one of PEFT's layouts.

    Attributes:
        a, b: tensor names. The rank is A's first axis and B's second; a convolution's kernel is flattened.
        scale: PEFT's scaling, alpha / r or alpha / sqrt(r).
        experts: 0 for one matrix, else how many are stacked along A's first axis (expert-major) and B's second
            (rank-major), as ``peft.tuners.lora.layer.ParamWrapper`` keeps them.
        flip: whether the parameter is stored as (in, out): the update is then ``(B @ A).T``.
        magnitude: DoRA's magnitudes, or None. Each output of ``W + scale * B @ A`` is scaled to that length.
    """

    a: str
    b: str
    scale: float
    experts: int = 0
    flip: bool = False
    magnitude: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, slots=True)
class Added:
    """``W + scale * tensor``: the bias of ``lora_B``."""

    tensor: str
    scale: float

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)


@dataclass(frozen=True, slots=True)
class Whole:
    """The parameter was trained and saved whole: it replaces the base's."""

    tensor: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows were trained and saved: they replace the base's.

    Attributes:
        tensor: the rows.
        at: their places, in the tensor's order.
    """

    tensor: str
    at: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)


@dataclass(frozen=True, slots=True)
class Layer:
    """Only PEFT's own code knows: the layer is built, adapted and merged by PEFT.

    Attributes:
        path: of the module.
        part: the parameter's name in it: "weight".
        tensors: the adapter's tensors of this layer, and those that all layers share.
    """

    path: str
    part: str
    tensors: tuple[str, ...]


Change = LowRank | Added | Whole | Rows | Layer
