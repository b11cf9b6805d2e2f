"""A checkpoint's weight files as they lie on disk: header bytes, and where each tensor's bytes are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.errors import reraise_as
from graftkit.merging.errors import base_unreadable
from graftkit.surveying.checkpoint.headers import read_headers

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
# safetensors' names -> torch's, for the types that weights are merged in.
FLOATS: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file.

    Attributes:
        dtype: as safetensors names it: "BF16".
        shape: as stored.
        begin, end: of its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file.

    Attributes:
        path: of the file.
        header: its first bytes: the header's length and the header itself.
        tensors: name -> place, in the header's order.
        size: of the whole file, in bytes.
    """

    path: Path
    header: bytes = field(repr=False)
    tensors: Mapping[str, Stored] = field(repr=False)
    size: int

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Weights:
    """All weight files of one folder.

    Attributes:
        folder: that holds them.
        shards: in the order of their names.
        index: what ``model.safetensors.index.json`` holds, or None where there is a single file.
    """

    folder: Path
    shards: tuple[Shard, ...] = field(repr=False)
    index: Mapping[str, object] | None = field(repr=False)

    @cached_property
    def home(self) -> Mapping[str, Shard]:
        """Tensor -> the shard that counts for it: the one that the index names, where two hold it."""
        named = self.index["weight_map"] if self.index is not None else {}
        assert isinstance(named, dict)
        return {name: s for s in self.shards for name in s.tensors if named.get(name, s.name) == s.name}

    def stored(self, name: str) -> Stored:
        return self.home[name].tensors[name]

    @property
    def total_size(self) -> int:
        """Bytes of tensor data, each tensor counted once."""
        return sum(self.stored(name).nbytes for name in self.home)

    @property
    def file_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def read_weights(folder: Path) -> Weights:
    """Read the headers of a checkpoint folder.

    Raises:
        SourceError: as :func:`graftkit.surveying.checkpoint.headers.read_headers`; ``not-readable``: a file went
            since.
    """
    headers = read_headers(folder)
    single = (folder / SINGLE).is_file()
    names = [SINGLE] if single else sorted({tensor.file for tensor in headers.values()})
    shards = tuple(_base_shard(folder / name) for name in names)
    return Weights(folder, shards, None if single else _index(folder / INDEX))


def _base_shard(path: Path) -> Shard:
    with reraise_as(base_unreadable, path):
        return read_shard(path)


def _index(path: Path) -> Mapping[str, object]:
    with reraise_as(base_unreadable, path):
        return json.loads(path.read_bytes())  # type: ignore[no-any-return]


def read_shard(path: Path) -> Shard:
    """Read one file's header, which ``read_headers`` has checked.

    Raises:
        OSError: it cannot be read any more.
    """
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        header = length + file.read(int.from_bytes(length, "little"))
    entries = json.loads(header[_LENGTH_BYTES:])
    entries.pop("__metadata__", None)
    tensors = {name: _stored(entry, len(header)) for name, entry in entries.items()}
    return Shard(path, header, MappingProxyType(tensors), path.stat().st_size)


def _stored(entry: dict[str, object], data: int) -> Stored:
    shape, offsets = entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    return Stored(str(entry["dtype"]), tuple(shape), data + offsets[0], data + offsets[1])


def torch_dtype(name: str) -> torch.dtype:
    """torch's type for a safetensors name among ``FLOATS``."""
    import torch

    return getattr(torch, FLOATS[name])  # type: ignore[no-any-return]
