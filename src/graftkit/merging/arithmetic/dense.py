"""The whole update of a disk tensor, for changes that cannot be placed by blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graftkit.errors import MergeError
from graftkit.merging.arithmetic.changes import Added, Layer, LowRank, Rows, Whole
from graftkit.merging.arithmetic.terms import DoraTerm, Window, factors
from graftkit.merging.checkpoint.block_map import Block, matrix_shape
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.merging.checkpoint.weight_conversion import Group
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.read import buffer_of, opened
from graftkit.merging.plan import Job, MergePlan, Part
from graftkit.text import first_line

if TYPE_CHECKING:
    import torch


def update_of(plan: MergePlan, job: Job, part: Part) -> torch.Tensor:
    """A part's update of a job's tensor, (rows, columns), float64.

    The parameter's update is converted to the disk's layout by transformers itself: every conversion it has is
    linear, so that an update may be converted like a weight.
    """
    import torch

    model = plan.base.model
    update = _param_update(plan, part)
    group = job.group
    shapes = plan.base.shapes
    rest = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in group.params if name != part.param}
    made = group.save(model, {**rest, part.param: update.view(shapes[part.param])})
    placed = made[job.source if group.converter is not None else next(iter(group.disk))]
    if math.prod(placed.shape) != job.stored.numel:
        raise MergeError(
            "a weight has another size on disk than in the model",
            where=job.name,
            why=f"{list(job.stored.shape)} on disk, {list(placed.shape)} expected",
            help="save the base with save_pretrained() of the class that its config.json names",
            code="merge-layout",
        )
    return placed.reshape(job.rows, job.columns)


def read_param(plan: MergePlan, param: str) -> torch.Tensor:
    """A parameter of the base, converted from its disk tensors by transformers."""
    group: Group = plan.base.groups.of_param[param]
    tensors = {name: read_disk(plan, name) for name in group.disk}
    return group.load(plan.base.model, tensors)[param].view(plan.base.shapes[param])


def _mapped_param(plan: MergePlan, param: str) -> torch.Tensor:
    """A parameter that costs memory only where it is read or changed, which the file does not notice.

    Tuners whose layers share values are built whole: this keeps the base's weights out of memory all the same.
    """
    import torch

    group = plan.base.groups.of_param[param]
    name = next(iter(group.disk))
    stored = plan.base.weights.stored(name)
    dtype = torch_dtype(stored.dtype)
    if group.converter is not None or stored.begin % dtype.itemsize:
        return read_param(plan, param)
    shard = plan.base.weights.shard_of[name]
    try:
        storage = torch.UntypedStorage.from_file(str(shard.path), False, shard.size)
    except RuntimeError as error:
        raise base_unreadable(str(shard.path), first_line(error)) from error
    whole = torch.empty(0, dtype=dtype)
    whole.set_(storage, stored.begin // dtype.itemsize, stored.shape)  # type: ignore[call-overload]
    return whole.view(plan.base.shapes[param])


def read_disk(plan: MergePlan, name: str) -> torch.Tensor:
    """A whole disk tensor."""
    stored = plan.base.weights.stored(name)
    buffer = buffer_of(stored.nbytes)
    with opened(plan.base.weights.shard_of[name].path, base_unreadable) as file:
        file.read_into(buffer, stored.begin)
    return buffer.view(torch_dtype(stored.dtype)).view(stored.shape)


def _param_update(plan: MergePlan, part: Part) -> torch.Tensor:
    change, tensors = part.change, part.effects.tensors
    if isinstance(change, Layer):
        return _layer_update(plan, part, change)
    if isinstance(change, LowRank) and change.magnitude is None:
        return _low_rank(plan, part, change)
    if isinstance(change, Added):
        return tensors.read(change.tensor).double() * change.scale
    base = read_param(plan, part.param).double()
    if isinstance(change, LowRank):
        return _dora(part, change, base)
    if isinstance(change, Whole):
        return tensors.read(change.tensor).double() - base
    assert isinstance(change, Rows)
    update = base.new_zeros(base.shape)
    update[list(change.at)] = tensors.read(change.tensor).double() - base[list(change.at)]
    return update


def _low_rank(plan: MergePlan, part: Part, change: LowRank) -> torch.Tensor:
    import torch

    count, height, width = matrix_shape(plan.base.shapes[part.param], stacked=bool(change.experts))
    update = torch.empty(count, height, width, dtype=torch.float64)
    for at in range(count):
        block = Block(part.param, at, 0, 0, range(height), range(width), transposed=False)
        left, right = factors(change, part.effects.tensors, block, torch.float64)
        torch.mm(left, right, out=update[at])
    return update.mul_(change.scale)


def _dora(part: Part, change: LowRank, base: torch.Tensor) -> torch.Tensor:
    matrix = base.flatten(1)
    block = Block(part.param, 0, 0, 0, range(matrix.shape[0]), range(matrix.shape[1]), transposed=False)
    term = DoraTerm.of(change, part.effects.tensors, block, 1.0, lambda begin, end: matrix[begin:end])
    merged = matrix.clone()
    term.add(Window(merged, matrix, 0))
    return merged - matrix


def _layer_update(plan: MergePlan, part: Part, change: Layer) -> torch.Tensor:
    merged = plan.shop.merged(change, part.effects, plan.base.model, lambda name: _mapped_param(plan, name))
    return merged[change.part] - read_param(plan, part.param).double()
