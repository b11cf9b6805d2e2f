"""The whole update of a disk tensor, for changes that cannot be computed on its rows alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graftkit.errors import MergeError
from graftkit.merging.arithmetic.changes import BlockChange, PeftLayer
from graftkit.merging.arithmetic.terms import Target, Window
from graftkit.merging.checkpoint.block_map import matrix_shape, parameter_blocks
from graftkit.merging.checkpoint.parameters import read_parameter
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.merging.errors import base_unreadable
from graftkit.merging.plan import Job, MergePlan, Part
from graftkit.text import first_line

if TYPE_CHECKING:
    import torch


def update_of(plan: MergePlan, job: Job, part: Part) -> torch.Tensor:
    """Return a part's update of a job's tensor, (rows, columns), float64, without the adapter's weight.

    transformers itself converts the parameter's update to the layout on disk: its conversions are all linear, so
    that an update can be converted like a weight.
    """
    import torch

    change = part.change
    update = _merged_by_peft(plan, part, change) if isinstance(change, PeftLayer) else _update(plan, part, change)
    group, shapes = job.group, plan.base.shapes
    rest = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in group.params if name != part.param}
    converted = group.save(plan.base.model, {**rest, part.param: update.view(shapes[part.param])})
    stored = converted[job.source if group.converter is not None else next(iter(group.disk))]
    if math.prod(stored.shape) != job.stored.numel:
        raise MergeError(
            "a weight has another size on disk than in the model",
            where=job.name,
            why=f"{list(job.stored.shape)} on disk, {list(stored.shape)} expected",
            help="save the base with save_pretrained() of the class that its config.json names",
            code="merge-layout",
        )
    return stored.reshape(job.rows, job.columns)


def _update(plan: MergePlan, part: Part, change: BlockChange) -> torch.Tensor:
    """Run the part's term on the parameter itself, as if it were stored alone."""
    import torch

    shape = plan.base.shapes[part.param]
    count, height, width = matrix_shape(shape, part.stacked)
    if change.needs_base:
        base = _trained_on(plan, part).double().reshape(count * height, width)
        result = base.clone()
    else:
        base = result = torch.zeros(count * height, width, dtype=torch.float64)
    blocks = parameter_blocks(part.param, shape, part.stacked)
    target = Target(blocks, part.stacked, lambda begin, end: base[begin:end])
    change.term(part.effects.tensors, target, 1.0).add(Window(result, base, 0))
    return result.sub_(base) if change.needs_base else result


def _trained_on(plan: MergePlan, part: Part) -> torch.Tensor:
    """Read the weight that a change starts from: the base's, or the one that the adapter holds whole."""
    if part.saved is not None:
        return part.effects.tensors.read(part.saved.tensor)
    return read_parameter(plan.base, part.param)


def _merged_by_peft(plan: MergePlan, part: Part, change: PeftLayer) -> torch.Tensor:
    def read(name: str) -> torch.Tensor:
        return _trained_on(plan, part) if part.saved and name == part.param else _mapped_param(plan, name)

    merged = plan.merger.merged(change, part.effects, plan.base.model, read)
    return merged[change.parameter] - _trained_on(plan, part).double()


def _mapped_param(plan: MergePlan, param: str) -> torch.Tensor:
    """Map a parameter of the base from its file, where possible: it takes memory only where it is read or changed.

    Tuners whose layers share values are built with all their layers: this keeps the base's weights out of memory.
    """
    import torch

    group = plan.base.groups.of_param[plan.base.stored_as(param)]
    name = next(iter(group.disk))
    stored = plan.base.weights.stored(name)
    dtype = torch_dtype(stored.dtype)
    if group.converter is not None or stored.begin % dtype.itemsize:
        return read_parameter(plan.base, param)
    shard = plan.base.weights.shard_of[name]
    try:
        # Not shared: changes stay in memory, and never reach the file.
        storage = torch.UntypedStorage.from_file(str(shard.path), False, shard.size)
    except RuntimeError as error:
        raise base_unreadable(str(shard.path), first_line(error)) from error
    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(storage, stored.begin // dtype.itemsize, stored.shape)  # type: ignore[call-overload]
    return tensor.view(plan.base.shapes[param])
