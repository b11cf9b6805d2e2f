"""A change as arithmetic on rows of one disk tensor, seen as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.checkpoint.block_map import Block

if TYPE_CHECKING:
    import torch

# Reads rows of the base's matrix: read(begin, end) -> (end - begin, columns), float64.
ReadRows = Callable[[int, int], "torch.Tensor"]

# Rows of a matrix are read in steps of about this many elements where all of them are needed.
_STEP = 2**20

# Roundings of a value apart from those of its sums: converting, scaling, adding it; see `Term.errors`.
_STEPS = 4
# What PEFT computes inside a layer is not known here: as many roundings, of the row's largest values.
_PEFT_STEPS = 256


@dataclass(frozen=True)
class Target:
    """Where a change is made.

    Attributes:
        blocks: the rectangles of the matrix that hold the parameter.
        stacked: whether the parameter is one matrix per expert.
        read: reads the base's rows.
    """

    blocks: Sequence[Block]
    stacked: bool
    read: ReadRows


@dataclass(frozen=True, slots=True)
class Window:
    """Some rows of a disk tensor's matrix, being merged.

    Attributes:
        result: the rows so far, (n, columns), float64; initially the base's.
        base: the same rows of the base; may be ``result`` itself where no term needs them.
        first: index of the first row.
    """

    result: torch.Tensor
    base: torch.Tensor
    first: int

    @property
    def rows(self) -> slice:
        """The window's rows of the matrix."""
        return slice(self.first, self.first + len(self.result))

    def overlap(self, block: Block) -> range:
        """Return the rows of the matrix that are in both the window and the block."""
        return range(max(self.first, block.row), min(self.rows.stop, block.row + block.height))

    def inside(self, block: Block, rows: range) -> tuple[slice, slice]:
        """Return where some rows of a block are in the window."""
        at = slice(rows.start - self.first, rows.stop - self.first)
        return at, slice(block.column, block.column + block.width)


class Term(Protocol):
    """What one change adds to some rows of a disk tensor's matrix."""

    def add(self, window: Window) -> None:
        """Change ``window.result`` in place."""

    def errors(self, window: Window, units: torch.Tensor) -> None:
        """Add the largest error that computing this term can make, in any order of summation.

        Args:
            window: before :meth:`add`.
            units: (n, columns), float64, in units of the rounding error (2**-24 in single precision): the sizes of
                all that is summed, each times the number of its roundings, and at least ``_STEPS`` times. The
                rounding of the result so far is not included. Source: Higham, "Accuracy and Stability of
                Numerical Algorithms", 2002, section 3.1.
        """


def block_factors(
    a: torch.Tensor, b: torch.Tensor, experts: int, flip: bool, block: Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left (height, r) and right (r, width) with ``left @ right`` the unscaled update of a block.

    Args:
        a, b, experts, flip: as in :class:`graftkit.merging.arithmetic.changes.LowRank`.
        block: a rectangle of the disk tensor's matrix.
    """
    if experts:
        a = a.view(experts, -1, a.shape[-1])[block.at]
        b = b.view(b.shape[0], -1, experts)[:, :, block.at]
    a, b = a.flatten(1), b.flatten(1)
    left, right = (a.T, b.T) if flip else (b, a)
    left, right = left[_slice(block.outs)], right[:, _slice(block.ins)]
    return (right.T, left.T) if block.transposed else (left, right)


def _slice(run: range) -> slice:
    return slice(run.start, run.stop, run.step)


@dataclass(frozen=True)
class LowRankTerm:
    """``scale * left @ right`` on each block. The factors keep their stored dtype until they are used.

    Attributes:
        a, b, experts, flip: as in :class:`graftkit.merging.arithmetic.changes.LowRank`.
        scale: with the adapter's weight.
    """

    a: torch.Tensor
    b: torch.Tensor
    experts: int
    flip: bool
    blocks: Sequence[Block]
    scale: float

    def add(self, window: Window) -> None:
        for inside, left, right in self._factors(window):
            window.result[inside].addmm_(left, right, alpha=self.scale)

    def errors(self, window: Window, units: torch.Tensor) -> None:
        for inside, left, right in self._factors(window):
            steps = left.shape[1] + _STEPS
            units[inside].addmm_(left.abs(), right.abs(), alpha=steps * abs(self.scale))

    def _factors(self, window: Window) -> Iterator[tuple[tuple[slice, slice], torch.Tensor, torch.Tensor]]:
        """Yield, for each block in the window, where it lies there and its factors, float64."""
        for block in self.blocks:
            rows = window.overlap(block)
            if rows:
                left, right = block_factors(self.a, self.b, self.experts, self.flip, block)
                left = left[rows.start - block.row : rows.stop - block.row]
                yield window.inside(block, rows), left.double(), right.double()


@dataclass(frozen=True)
class DoraTerm:
    """``weight * (magnitude / norm(v) * v - W)`` with ``v = W + scale * left @ right``, where W is the matrix.

    The norm is that of each output: of the row, or of the column where W is stored as (in, out).
    Source: ``peft.tuners.lora.dora.DoraLinearLayer.get_weight_norm``.

    Attributes:
        left, right: (rows, r) and (r, columns), float64.
        magnitude: one length per output, float64.
        norms: the outputs' lengths, (columns,), where outputs are columns, else None.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor
    norms: torch.Tensor | None
    weight: float

    def add(self, window: Window) -> None:
        v = self._adapted(window)
        v *= self._factor(v, window)
        window.result.add_(v - window.base, alpha=self.weight)

    def errors(self, window: Window, units: torch.Tensor) -> None:
        v = self._adapted(window)
        left = self.left[window.rows]
        sizes = window.base.abs().addmm(left.abs(), self.right.abs(), alpha=abs(self.scale))
        steps = left.shape[1] + _STEPS
        if self.norms is not None:
            # A column's sizes are at most those of its sums, and twice the update's (Cauchy-Schwarz).
            update = 2 * abs(self.scale) * self.left.norm() * self.right.norm(dim=0)
            spread, count = 1 + update / self.norms, len(self.left)
        else:
            spread, count = (sizes.norm(dim=1) / v.norm(dim=1)).unsqueeze(1), v.shape[1]
        # A sum of squares: its roundings add up like a random walk.
        of_norm = steps * spread + 2 * math.sqrt(count)
        product = (steps * sizes + (of_norm + _STEPS) * v.abs()) * self._factor(v, window).abs()
        units.add_(product + _STEPS * window.base.abs(), alpha=abs(self.weight))

    def _adapted(self, window: Window) -> torch.Tensor:
        return window.base.addmm(self.left[window.rows], self.right, alpha=self.scale)

    def _factor(self, v: torch.Tensor, window: Window) -> torch.Tensor:
        """Return what each output is multiplied by."""
        if self.norms is not None:
            return self.magnitude / self.norms
        factor: torch.Tensor = self.magnitude[window.rows] / v.norm(dim=1)
        return factor.unsqueeze(1)


def column_norms(left: torch.Tensor, right: torch.Tensor, scale: float, read: ReadRows) -> torch.Tensor:
    """Return the norms of the columns of ``W + scale * left @ right``, (columns,), float64."""
    import torch

    squares = torch.zeros(right.shape[1], dtype=torch.float64)
    step = max(1, _STEP // right.shape[1])
    for begin in range(0, len(left), step):
        end = min(begin + step, len(left))
        squares += read(begin, end).addmm(left[begin:end], right, alpha=scale).square().sum(dim=0)
    return squares.sqrt()


@dataclass(frozen=True)
class BiasTerm:
    """``scale * vector``, where the disk tensor, one row, holds the vector or more.

    Attributes:
        vector: float64.
        scale: with the adapter's weight.
    """

    vector: torch.Tensor
    blocks: Sequence[Block]
    scale: float

    def add(self, window: Window) -> None:
        for block in self.blocks:
            part = window.result[:, block.column : block.column + block.width]
            part.add_(self.vector[_slice(block.ins)], alpha=self.scale)

    def errors(self, window: Window, units: torch.Tensor) -> None:  # noqa: ARG002
        for block in self.blocks:
            part = units[:, block.column : block.column + block.width]
            part.add_(self.vector[_slice(block.ins)].abs(), alpha=_STEPS * abs(self.scale))


@dataclass(frozen=True)
class SavedWeightTerm:
    """``weight * (saved - W)`` on each block."""

    name: str
    tensors: AdapterTensors
    stacked: bool
    blocks: Sequence[Block]
    weight: float

    def add(self, window: Window) -> None:
        for inside, saved in self._blocks(window):
            _replace(window.result[inside], window.base[inside], saved, self.weight)

    def errors(self, window: Window, units: torch.Tensor) -> None:
        for inside, saved in self._blocks(window):
            units[inside] += _replacing(window.result[inside], window.base[inside], saved, self.weight)

    def in_place_of(self, base: torch.Tensor, first: int) -> torch.Tensor:
        """Return the base's rows with the saved values in them, whatever the weight."""
        saved = base.clone()
        for inside, values in self._blocks(Window(saved, base, first)):
            saved[inside] = values
        return saved

    def _blocks(self, window: Window) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """Yield, for each block in the window, where it lies there and its saved values, float64."""
        for block in self.blocks:
            rows = window.overlap(block)
            if rows:
                saved = self._saved(block, rows.start - block.row, rows.stop - block.row)
                yield window.inside(block, rows), saved.double()

    def _saved(self, block: Block, begin: int, end: int) -> torch.Tensor:
        """Read the saved values of rows ``begin`` to ``end`` of a block, (end - begin, width)."""
        shape = self.tensors.shapes[self.name]
        if len(shape) < 2:
            return self.tensors.read(self.name).view(1, -1)[:, _slice(block.ins)]
        if self.stacked:
            matrix = self.tensors.rows(self.name, block.at, block.at + 1)[0]
        elif block.transposed:
            matrix = self.tensors.read(self.name).flatten(1)
        else:
            wanted = block.outs[begin:end]
            rows = self.tensors.rows(self.name, wanted[0], wanted[-1] + 1)
            return rows.flatten(1)[:: wanted.step, _slice(block.ins)]
        part = matrix[_slice(block.outs), _slice(block.ins)]
        return (part.T if block.transposed else part)[begin:end]


@dataclass(frozen=True)
class OnSavedTerm:
    """A term whose W is the weight that the adapter holds whole, instead of the base's."""

    term: Term
    saved: SavedWeightTerm

    def add(self, window: Window) -> None:
        self.term.add(self._on_saved(window))

    def errors(self, window: Window, units: torch.Tensor) -> None:
        self.term.errors(self._on_saved(window), units)

    def _on_saved(self, window: Window) -> Window:
        return replace(window, base=self.saved.in_place_of(window.base, window.first))


@dataclass(frozen=True)
class SavedRowsTerm:
    """``weight * (saved - W)`` on some rows.

    Attributes:
        at: indices of the rows.
        saved: (n, columns), float64.
    """

    at: Sequence[int]
    saved: torch.Tensor
    weight: float

    def add(self, window: Window) -> None:
        for row, saved in self._rows(window):
            _replace(window.result[row], window.base[row], saved, self.weight)

    def errors(self, window: Window, units: torch.Tensor) -> None:
        for row, saved in self._rows(window):
            units[row] += _replacing(window.result[row], window.base[row], saved, self.weight)

    def _rows(self, window: Window) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the saved rows that are in the window, with their indices there."""
        for at, saved in zip(self.at, self.saved, strict=True):
            if window.rows.start <= at < window.rows.stop:
                yield at - window.first, saved


def _replace(result: torch.Tensor, base: torch.Tensor, saved: torch.Tensor, weight: float) -> None:
    """Move ``result`` by ``weight * (saved - base)``; exactly to ``saved`` where it is all that changes."""
    if _is_copy(result, base, weight):
        result.copy_(saved)
    else:
        result += weight * (saved - base)


def _replacing(
    result: torch.Tensor, base: torch.Tensor, saved: torch.Tensor, weight: float
) -> torch.Tensor | float:
    """Return the errors of :func:`_replace`, as :meth:`Term.errors` counts them: a copy makes none."""
    if _is_copy(result, base, weight):
        return 0.0
    return _STEPS * abs(weight) * (saved.abs() + base.abs())


def _is_copy(result: torch.Tensor, base: torch.Tensor, weight: float) -> bool:
    import torch

    return weight == 1.0 and torch.equal(result, base)


@dataclass(frozen=True)
class DenseTerm:
    """``weight * update``, where only the whole update is known.

    Attributes:
        update: of the disk tensor, (rows, columns), float64.
    """

    update: torch.Tensor
    weight: float

    def add(self, window: Window) -> None:
        window.result.add_(self.update[window.rows], alpha=self.weight)

    def errors(self, window: Window, units: torch.Tensor) -> None:
        sizes = self.update[window.rows].abs() + window.base.abs()
        units.add_(sizes.amax(dim=1, keepdim=True), alpha=_PEFT_STEPS * abs(self.weight))
