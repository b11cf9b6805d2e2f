"""A checkpoint's weight files as they lie on disk: header bytes, and where each tensor's bytes are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.errors import reraise_as
from graftkit.merging.errors import base_unreadable
from graftkit.surveying.checkpoint.headers import INDEX, SINGLE, read_headers
from graftkit.surveying.checkpoint.safetensors_header import FileHeader, StoredTensor

if TYPE_CHECKING:
    import torch

# safetensors' names -> torch's, for the dtypes that weights are merged in.
FLOATS: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)


@dataclass(frozen=True)
class Shard:
    """One weight file of the base."""

    path: Path
    header: FileHeader = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Tensor name -> dtype, shape and byte range, in the header's order."""
        return self.header.tensors

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return self.header.file_bytes


@dataclass(frozen=True)
class Weights:
    """All weight files of one folder.

    Attributes:
        shards: sorted by file name.
        index: the content of ``model.safetensors.index.json``, or None for a single file.
    """

    folder: Path
    shards: tuple[Shard, ...] = field(repr=False)
    index: Mapping[str, object] | None = field(repr=False)

    @cached_property
    def shard_of(self) -> Mapping[str, Shard]:
        """Tensor name -> its shard: the one that the index names, where two hold it."""
        named = self.index["weight_map"] if self.index is not None else {}
        assert isinstance(named, dict)
        return {name: s for s in self.shards for name in s.tensors if named.get(name, s.name) == s.name}

    def stored(self, name: str) -> StoredTensor:
        return self.shard_of[name].tensors[name]

    @property
    def total_size(self) -> int:
        """Bytes of tensor data, each tensor counted once."""
        return sum(self.stored(name).nbytes for name in self.shard_of)

    @property
    def file_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def read_weights(folder: Path) -> Weights:
    """Read the headers of a checkpoint folder.

    Raises:
        SourceError: as :func:`graftkit.surveying.checkpoint.headers.read_headers`; ``not-readable``: the index has
            been removed since.
    """
    files = read_headers(folder).files
    shards = tuple(Shard(folder / name, files[name]) for name in sorted(files))
    return Weights(folder, shards, None if set(files) == {SINGLE} else _index(folder / INDEX))


def _index(path: Path) -> Mapping[str, object]:
    with reraise_as(base_unreadable, path):
        return json.loads(path.read_bytes())  # type: ignore[no-any-return]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a safetensors name among ``FLOATS``."""
    import torch

    return getattr(torch, FLOATS[name])  # type: ignore[no-any-return]
