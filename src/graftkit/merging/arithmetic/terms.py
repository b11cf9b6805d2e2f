"""A change as arithmetic on rows of one disk tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import Added, LowRank, Rows, Whole
from graftkit.merging.checkpoint.block_map import Block, matrix_shape

if TYPE_CHECKING:
    import torch

# Rows of the base's matrix, as float64: read(begin, end).
ReadRows = Callable[[int, int], "torch.Tensor"]

# Rows of a matrix are read in steps of about this many elements where all of them are needed.
_STEP = 2**20


@dataclass(frozen=True, slots=True)
class Window:
    """Some rows of a disk tensor's matrix, being merged.

    Attributes:
        result: the rows so far, (n, columns), in the type that is computed in. Starts as the base's.
        base: the same rows of the base; the same tensor as ``result`` where no term has to compare with it.
        first: index of the first row.
    """

    result: torch.Tensor
    base: torch.Tensor
    first: int

    @property
    def rows(self) -> slice:
        """Of the matrix."""
        return slice(self.first, self.first + len(self.result))

    def overlap(self, block: Block) -> range:
        """The rows of the matrix that are in the window and in a block."""
        return range(max(self.first, block.row), min(self.rows.stop, block.row + block.height))


class Term(Protocol):
    """What one change adds to some rows of a disk tensor's matrix."""

    def add(self, window: Window) -> None:
        """Change ``window.result`` in place."""


def factors(
    change: LowRank, tensors: AdapterTensors, block: Block, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Left (height, r) and right (r, width) with ``left @ right`` the unscaled update of a block."""
    left, right = _sides(change, tensors.read(change.a), tensors.read(change.b), block)
    return left.to(dtype), right.to(dtype)


def _sides(change: LowRank, a: torch.Tensor, b: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    if change.experts:
        a = a.view(change.experts, -1, a.shape[-1])[block.at]
        b = b.view(b.shape[0], -1, change.experts)[:, :, block.at]
    a, b = a.flatten(1), b.flatten(1)
    left, right = (a.T, b.T) if change.flip else (b, a)
    left, right = left[_slice(block.outs)], right[:, _slice(block.ins)]
    return (right.T, left.T) if block.transposed else (left, right)


def _slice(run: range) -> slice:
    return slice(run.start, run.stop, run.step)


@dataclass(frozen=True)
class LowRankTerm:
    """``scale * left @ right`` on each block; until they are used, the factors stay as they are stored."""

    change: LowRank
    a: torch.Tensor
    b: torch.Tensor
    blocks: Sequence[Block]
    scale: float

    @classmethod
    def of(cls, change: LowRank, tensors: AdapterTensors, blocks: Sequence[Block], weight: float) -> LowRankTerm:
        experts = {block.at for block in blocks}
        if change.experts and len(experts) == 1:
            a, b = _one_expert(change, tensors, experts.pop())
            return cls(replace(change, experts=0), a, b, blocks, change.scale * weight)
        return cls(change, tensors.read(change.a), tensors.read(change.b), blocks, change.scale * weight)

    def add(self, window: Window) -> None:
        for block in self.blocks:
            run = window.overlap(block)
            if not run:
                continue
            left, right = _sides(self.change, self.a, self.b, block)
            left = left[run.start - block.row : run.stop - block.row]
            part = window.result[_inside(window, block, run)]
            part.addmm_(left.to(part.dtype), right.to(part.dtype), alpha=self.scale)


def _one_expert(change: LowRank, tensors: AdapterTensors, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one expert, for a disk tensor that holds no other; B has to be read whole, but once."""
    rank = tensors.shapes[change.a][0] // change.experts
    b = tensors.read_cached(change.b)
    return tensors.rows(change.a, at * rank, (at + 1) * rank), b.view(len(b), rank, -1)[:, :, at].contiguous()


@dataclass(frozen=True)
class DoraTerm:
    """``magnitude / norm(v) * v`` with ``v = W + scale * left @ right``, less W, on one block that is all of W.

    Attributes:
        left, right, scale: of the low-rank update, in float64.
        magnitude: one length an output, float64.
        norms: the outputs' lengths where they run along columns, else None: a row's length comes from the row.
        weight: of the adapter.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor
    norms: torch.Tensor | None
    weight: float

    @classmethod
    def of(cls, change: LowRank, tensors: AdapterTensors, block: Block, weight: float, read: ReadRows) -> DoraTerm:
        import torch

        assert change.magnitude is not None
        left, right = factors(change, tensors, block, torch.float64)
        magnitude = tensors.read(change.magnitude).double().flatten()
        along_columns = change.flip != block.transposed
        norms = _column_norms(left, right, change.scale, read) if along_columns else None
        return cls(left, right, change.scale, magnitude, norms, weight)

    def add(self, window: Window) -> None:
        v = window.base.addmm(self.left[window.rows], self.right, alpha=self.scale)
        if self.norms is not None:
            v *= self.magnitude / self.norms
        else:
            v *= (self.magnitude[window.rows] / v.norm(dim=1)).unsqueeze(1)
        window.result.add_(v - window.base, alpha=self.weight)


def _column_norms(left: torch.Tensor, right: torch.Tensor, scale: float, read: ReadRows) -> torch.Tensor:
    import torch

    squares = torch.zeros(right.shape[1], dtype=torch.float64)
    step = max(1, _STEP // right.shape[1])
    for begin in range(0, len(left), step):
        end = min(begin + step, len(left))
        squares += read(begin, end).addmm(left[begin:end], right, alpha=scale).square().sum(dim=0)
    return squares.sqrt()


@dataclass(frozen=True)
class AddedTerm:
    """``scale * vector`` on a part of a vector."""

    vector: torch.Tensor
    blocks: Sequence[Block]
    scale: float

    @classmethod
    def of(cls, change: Added, tensors: AdapterTensors, blocks: Sequence[Block], weight: float) -> AddedTerm:
        return cls(tensors.read(change.tensor).double(), blocks, change.scale * weight)

    def add(self, window: Window) -> None:
        for block in self.blocks:
            part = window.result[:, block.column : block.column + block.width]
            part.add_(self.vector[_slice(block.ins)], alpha=self.scale)


@dataclass(frozen=True)
class WholeTerm:
    """``weight * (saved - W)`` on each block."""

    change: Whole
    tensors: AdapterTensors
    stacked: bool
    blocks: Sequence[Block]
    weight: float

    def add(self, window: Window) -> None:
        for block in self.blocks:
            run = window.overlap(block)
            if run:
                inside = _inside(window, block, run)
                saved = self._saved(block, run.start - block.row, run.stop - block.row).double()
                _replace(window.result[inside], window.base[inside], saved, self.weight)

    def _saved(self, block: Block, begin: int, end: int) -> torch.Tensor:
        """The saved values of some rows of a block."""
        shape = self.tensors.shapes[self.change.tensor]
        if len(shape) < 2:
            return self.tensors.read(self.change.tensor).view(1, -1)[:, _slice(block.ins)]
        if self.stacked:
            matrix = self.tensors.rows(self.change.tensor, block.at, block.at + 1)[0]
        elif block.transposed:
            matrix = self.tensors.read(self.change.tensor).flatten(1)
        else:
            wanted = block.outs[begin:end]
            rows = self.tensors.rows(self.change.tensor, wanted[0], wanted[-1] + 1)
            return rows.flatten(1)[:: wanted.step, _slice(block.ins)]
        part = matrix[_slice(block.outs), _slice(block.ins)]
        return (part.T if block.transposed else part)[begin:end]


@dataclass(frozen=True)
class RowsTerm:
    """``weight * (saved - W)`` on some rows."""

    at: Sequence[int]
    saved: torch.Tensor
    weight: float

    @classmethod
    def of(cls, change: Rows, tensors: AdapterTensors, weight: float) -> RowsTerm:
        return cls(change.at, tensors.read(change.tensor).double(), weight)

    def add(self, window: Window) -> None:
        for at, saved in zip(self.at, self.saved, strict=True):
            if window.rows.start <= at < window.rows.stop:
                row = at - window.first
                _replace(window.result[row], window.base[row], saved, self.weight)


def _inside(window: Window, block: Block, run: range) -> tuple[slice, slice]:
    """Where some rows of a block are in the window."""
    rows = slice(run.start - window.first, run.stop - window.first)
    return rows, slice(block.column, block.column + block.width)


def _replace(result: torch.Tensor, base: torch.Tensor, saved: torch.Tensor, weight: float) -> None:
    """Move ``result`` by ``weight * (saved - base)``: where it goes all the way, to the saved value itself."""
    import torch

    if weight == 1.0 and torch.equal(result, base):
        result.copy_(saved)
    else:
        result += weight * (saved - base)


@dataclass(frozen=True)
class DenseTerm:
    """``weight * update``, where only the whole update is known.

    Attributes:
        update: the disk tensor's, (rows, columns), float64.
    """

    update: torch.Tensor
    weight: float

    def add(self, window: Window) -> None:
        window.result.add_(self.update[window.rows], alpha=self.weight)


def covers(block: Block, shape: tuple[int, ...]) -> bool:
    """Whether a block is all of a parameter that is one matrix."""
    _, height, width = matrix_shape(shape, stacked=False)
    return block.outs == range(height) and block.ins == range(width) and (block.row, block.column) == (0, 0)
