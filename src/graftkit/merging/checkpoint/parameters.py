"""Read a parameter of the base from its files, converted by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.merging.checkpoint.base import Base
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.read import opened

if TYPE_CHECKING:
    import torch


def read_parameter(base: Base, name: str) -> torch.Tensor:
    """Read a parameter, in its stored dtype, from the disk tensors that it is made of.

    Raises:
        SourceError: ``not-readable``.
        KeyError: no file of the base contains it.
    """
    stored = base.stored_as(name)
    group = base.groups.of_param[stored]
    tensors = {disk: _read_disk(base, disk) for disk in group.disk}
    return group.load(base.model, tensors)[stored].view(base.shapes[name])


def _read_disk(base: Base, name: str) -> torch.Tensor:
    """Read a whole disk tensor."""
    stored = base.weights.stored(name)
    with opened(base.weights.shard_of[name].path, base_unreadable) as file:
        raw = file.read(stored.begin, stored.nbytes)
    return raw.view(torch_dtype(stored.dtype)).view(stored.shape)
