"""The five kinds of change that an adapter makes to one parameter W, each with its formula.

A change names the adapter's tensors; :meth:`BlockChange.term` reads them and gives the arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.terms import (
    BiasTerm,
    DoraTerm,
    LowRankTerm,
    SavedRowsTerm,
    SavedWeightTerm,
    Target,
    Term,
    block_factors,
    column_norms,
)

if TYPE_CHECKING:
    import torch


class BaseChange(ABC):
    """What every kind of change has."""

    __slots__ = ()
    # Whether it sets values, instead of adding to them.
    replaces: ClassVar[bool] = False

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that it takes."""

    @property
    def is_plain(self) -> bool:
        """Whether it only adds a product of two matrices."""
        return False

    @property
    def stacked(self) -> bool | None:
        """Whether it takes the parameter for one matrix per expert; None if the parameter's layout tells."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether the update depends on W."""
        return True


class BlockChange(BaseChange):
    """A change with a closed form, computed on rectangles of a disk tensor."""

    __slots__ = ()
    # Whether the disk tensor must not be transposed.
    by_rows: ClassVar[bool] = False

    @property
    def takes_any_blocks(self) -> bool:
        """Whether the parameter may be split over several disk tensors, or share one with others."""
        return True

    @abstractmethod
    def term(self, tensors: AdapterTensors, target: Target, weight: float) -> Term:
        """Read the change's tensors and return its arithmetic.

        Args:
            tensors: of the adapter.
            target: where the parameter lies.
            weight: the adapter's.
        """


@dataclass(frozen=True, slots=True)
class LowRank(BlockChange):
    """LoRA: ``W + scale * B @ A``; with DoRA, each output of that is rescaled to a trained length.

    Sources: ``get_delta_weight`` of ``Linear``, ``Embedding``, ``_ConvNd`` and ``ParamWrapper`` in
    ``peft.tuners.lora.layer``; ``DoraLinearVariant.merge_safe`` in ``peft.tuners.lora.variants``. A convolution's
    kernel is flattened.

    Attributes:
        a: name of A, (r, in); with experts (experts * r, in), expert-major.
        b: name of B, (out, r); with experts (out, r * experts), rank-major.
        rank: r, of one expert.
        scale: PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA (``LoraLayer.update_layer``).
        experts: number of matrices that the parameter stacks; 0 if it is one matrix.
        flip: whether the parameter is stored as (in, out): the update is then ``(B @ A).T``.
        magnitude: name of DoRA's lengths, (out,), or None.
    """

    a: str
    b: str
    rank: int
    scale: float
    experts: int = 0
    flip: bool = False
    magnitude: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def is_plain(self) -> bool:
        return self.magnitude is None

    @property
    def needs_base(self) -> bool:
        return self.magnitude is not None

    @property
    def takes_any_blocks(self) -> bool:
        return self.magnitude is None

    @property
    def stacked(self) -> bool:
        return bool(self.experts)

    def outer(self, tensors: AdapterTensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors: left (rows, r) and right (r, columns) of the parameter, if that is one matrix."""
        a, b = tensors.read(self.a), tensors.read(self.b)
        return (a.T, b.T) if self.flip else (b, a)

    def term(self, tensors: AdapterTensors, target: Target, weight: float) -> Term:
        if self.magnitude is not None:
            return self._dora(tensors, target, weight, self.magnitude)
        scale = self.scale * weight
        numbers = {block.at for block in target.blocks}
        if self.experts and len(numbers) == 1:
            a, b = self._one_expert(tensors, numbers.pop())
            return LowRankTerm(a, b, 0, self.flip, target.blocks, scale)
        a, b = tensors.read(self.a), tensors.read(self.b)
        return LowRankTerm(a, b, self.experts, self.flip, target.blocks, scale)

    def _one_expert(self, tensors: AdapterTensors, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A and B of one expert, for a disk tensor that holds no other; all of B has to be read, but once."""
        b = tensors.read_cached(self.b)
        a = tensors.rows(self.a, number * self.rank, (number + 1) * self.rank)
        return a, b.view(len(b), self.rank, -1)[:, :, number].contiguous()

    def _dora(self, tensors: AdapterTensors, target: Target, weight: float, magnitude: str) -> DoraTerm:
        block = target.blocks[0]
        factors = block_factors(tensors.read(self.a), tensors.read(self.b), self.experts, self.flip, block)
        left, right = (factor.double() for factor in factors)
        along_columns = self.flip != block.transposed
        norms = column_norms(left, right, self.scale, target.read) if along_columns else None
        return DoraTerm(left, right, self.scale, tensors.read(magnitude).double().flatten(), norms, weight)


@dataclass(frozen=True, slots=True)
class _OneTensor(BlockChange):
    tensor: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)


@dataclass(frozen=True, slots=True)
class BiasDelta(_OneTensor):
    """``W + scale * tensor``, of a vector: the bias of ``lora_B``.

    Source: ``peft.tuners.lora.layer.Linear.merge``.
    """

    scale: float

    @property
    def needs_base(self) -> bool:
        return False

    def term(self, tensors: AdapterTensors, target: Target, weight: float) -> Term:
        return BiasTerm(tensors.read(self.tensor).double(), target.blocks, self.scale * weight)


@dataclass(frozen=True, slots=True)
class SavedWeight(_OneTensor):
    """The whole parameter was trained and saved (``modules_to_save``, biases): it replaces W."""

    replaces: ClassVar[bool] = True

    def term(self, tensors: AdapterTensors, target: Target, weight: float) -> SavedWeightTerm:
        return SavedWeightTerm(self.tensor, tensors, target.stacked, target.blocks, weight)


@dataclass(frozen=True, slots=True)
class SavedRows(_OneTensor):
    """Some rows were trained and saved: they replace those of W.

    Source: ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge``.

    Attributes:
        tensor: the rows, (n, columns).
        at: their indices in W, in the tensor's order.
    """

    at: tuple[int, ...]
    replaces: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    @property
    def takes_any_blocks(self) -> bool:
        return False

    def term(self, tensors: AdapterTensors, target: Target, weight: float) -> Term:  # noqa: ARG002
        return SavedRowsTerm(self.at, tensors.read(self.tensor).double(), weight)


@dataclass(frozen=True, slots=True)
class PeftLayer(BaseChange):
    """A change without a closed form here: PEFT itself builds, adapts and merges the layer.

    Attributes:
        path: of the module.
        parameter: its name in the module: "weight".
        names: the adapter's tensors of this layer, and those that all layers share.
    """

    path: str
    parameter: str
    names: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.names


Change = BlockChange | PeftLayer
