"""Find where each part of a parameter lies on disk, by running transformers' conversion on meta tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.merging.checkpoint.weight_conversion import Group

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a disk tensor, seen as a matrix, and the part of a parameter's matrix that it holds.

    Attributes:
        param: name of the parameter.
        at: index of its matrix: the expert of a stacked parameter, else 0.
        row, column: the rectangle's first row and column in the disk tensor's matrix.
        outs, ins: the rows and columns of the parameter's matrix that it holds.
        transposed: whether it holds them transposed.
    """

    param: str
    at: int
    row: int
    column: int
    outs: range
    ins: range
    transposed: bool

    @property
    def height(self) -> int:
        return len(self.ins if self.transposed else self.outs)

    @property
    def width(self) -> int:
        return len(self.outs if self.transposed else self.ins)

    def covers(self, shape: Shape) -> bool:
        """Check whether it is all of a parameter that is one matrix."""
        _, height, width = matrix_shape(shape, stacked=False)
        return self.outs == range(height) and self.ins == range(width) and (self.row, self.column) == (0, 0)


def matrix_shape(shape: Shape, stacked: bool) -> tuple[int, int, int]:
    """Return a tensor's shape as matrices: (count, height, width).

    A stacked parameter is one matrix per expert. Any other tensor is one matrix of its first axis by all the rest;
    a vector is a single row.
    """
    if stacked:
        return shape[0], shape[1], shape[2]
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return 1, shape[0], math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A disk tensor as a matrix of ``columns`` columns, and the blocks, without overlaps, that it consists of."""

    columns: int
    blocks: tuple[Block, ...]


def find_blocks(
    group: Group, model: PreTrainedModel, disk: Mapping[str, Shape], params: Mapping[str, Shape], stacked: bool
) -> dict[str, BlockLayout] | None:
    """Return the blocks of each disk tensor of a group, or None where the conversion does not move whole blocks.

    Args:
        group: of disk tensors and parameters.
        model: on the meta device.
        disk, params: shapes by name.
        stacked: whether a parameter with three dimensions is one matrix per expert.
    """
    if group.converter is None:
        name, shape = group.params[0], params[group.params[0]]
        if any(math.prod(disk[d]) != math.prod(shape) for d in group.disk):
            return None
        layout = BlockLayout(matrix_shape(shape, stacked)[2], parameter_blocks(name, shape, stacked))
        return dict.fromkeys(group.disk, layout)
    try:
        found = _probe(group, model, disk, params)
    except (ValueError, RuntimeError, KeyError, AttributeError):
        # The converter asked for data, or for tensors that this checkpoint does not have.
        return None
    if not all(found.values()):
        return None
    return {name: BlockLayout(disk[name][-1], tuple(blocks)) for name, blocks in found.items()}


def parameter_blocks(param: str, shape: Shape, stacked: bool) -> tuple[Block, ...]:
    """Return the blocks of a tensor that is the parameter itself: one for each of its matrices."""
    count, height, width = matrix_shape(shape, stacked)
    return tuple(
        Block(param, at, at * height, 0, range(height), range(width), transposed=False) for at in range(count)
    )


def _probe(
    group: Group, model: PreTrainedModel, disk: Mapping[str, Shape], params: Mapping[str, Shape]
) -> dict[str, list[Block]]:
    import torch

    with torch.device("meta"), _no_copies():
        if len(group.disk) == 1:
            name = next(iter(group.disk))
            source = torch.empty(disk[name])
            made = group.load(model, {name: source})
            views = {param: _view(made[param], {name: source}) for param in group.params}
            found = [_from_param(param, params[param], view, disk[name]) for param, view in views.items()]
            return {name: list(itertools.chain.from_iterable(found)) if all(found) else []}
        sources = {param: torch.empty(params[param]) for param in group.params}
        saved = group.save(model, sources)
        return {name: _from_disk(disk[name], _view(tensor, sources)) for name, tensor in saved.items()}


def _no_copies() -> Any:
    """Turn ``contiguous()`` off, so that results stay views whose strides show where they come from."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoCopies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))

    return NoCopies()


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as a view of another.

    Attributes:
        source: name of the other tensor.
        shape: of the view.
        axes: for each axis of the view: (axis of the source, step), or None for an axis of length 1.
        start: for each axis of the source, where the view begins.
    """

    source: str
    shape: Shape
    axes: tuple[tuple[int, int] | None, ...]
    start: Shape


def _view(tensor: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> _View:
    """Describe a tensor as a view of one of the sources, from its strides.

    Raises:
        ValueError: it is not a view of one of them.
    """
    storage = tensor.untyped_storage()._cdata
    for name, source in sources.items():
        if source.untyped_storage()._cdata == storage:
            return _read_strides(name, tensor, source)
    raise ValueError("the conversion makes a new tensor")


def _read_strides(name: str, tensor: torch.Tensor, source: torch.Tensor) -> _View:
    strides = source.stride()
    rest, start = int(tensor.storage_offset()), []
    for stride in strides:
        start.append(rest // stride)
        rest %= stride
    axes: list[tuple[int, int] | None] = []
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        axes.append(_axis(stride, length, source) if length > 1 else None)
    return _View(name, tuple(tensor.shape), tuple(axes), tuple(start))


def _axis(stride: int, length: int, source: torch.Tensor) -> tuple[int, int]:
    for axis, own in enumerate(source.stride()):
        if stride % own == 0 and stride // own * (length - 1) < source.shape[axis]:
            return axis, stride // own
    raise ValueError("an axis of the view runs over several axes of its source")


def _from_disk(shape: Shape, view: _View) -> list[Block]:
    """Return the blocks of a disk tensor that is a view of a parameter; none if they are not rectangles."""
    if view.shape != shape or len(shape) not in (2, 3):
        return []
    found = []
    for outer in range(math.prod(shape[:-2])):
        start = list(view.start)
        if len(shape) == 3 and view.axes[0] is not None:
            axis, step = view.axes[0]
            start[axis] += outer * step
        block = _block(view, start, shape[-2:], view.axes[-2:], row=outer * shape[-2])
        if block is None:
            return []
        found.append(block)
    return found


def _block(
    view: _View, start: list[int], shape: Shape, axes: tuple[tuple[int, int] | None, ...], row: int
) -> Block | None:
    """Return one matrix of a disk tensor, whose axes must be the parameter's last two, in either order."""
    last = len(start) - 1
    if last < 1:
        return None
    down = axes[0] or (last - 1 if axes[1] is None or axes[1][0] == last else last, 1)
    across = axes[1] or (last if down[0] == last - 1 else last - 1, 1)
    if {down[0], across[0]} != {last, last - 1}:
        return None
    runs = {down[0]: (shape[0], down[1]), across[0]: (shape[1], across[1])}
    outs, ins = (
        range(start[axis], start[axis] + runs[axis][0] * runs[axis][1], runs[axis][1]) for axis in (last - 1, last)
    )
    at = start[0] if last == 2 else 0
    return Block(view.source, at, row, 0, outs, ins, transposed=down[0] == last)


def _from_param(param: str, shape: Shape, view: _View, disk: Shape) -> list[Block]:
    """Return the blocks of a disk tensor of which a whole parameter is a view; none if they are not rectangles."""
    if view.shape != shape or len(shape) not in (1, 2, 3) or len(view.start) != len(shape):
        return []
    if any(axis is not None and axis[1] != 1 for axis in view.axes):
        return []
    order = [axis[0] if axis is not None else at for at, axis in enumerate(view.axes)]
    if len(shape) == 1:
        return [Block(param, 0, 0, view.start[0], range(1), range(shape[0]), transposed=False)]
    if sorted(order) != list(range(len(shape))) or (len(shape) == 3 and order[0] != 0):
        return []
    count, height, width = matrix_shape(shape, stacked=len(shape) == 3)
    transposed = order[-2] > order[-1]
    first, row, column = (0, *view.start) if len(shape) == 2 else view.start
    return [
        Block(param, at, (first + at) * disk[-2] + row, column, range(height), range(width), transposed)
        for at in range(count)
    ]
