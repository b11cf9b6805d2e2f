"""The header of one safetensors file, read without trusting it: bounded, checked, and never past the header.

The format: 8 bytes (the header's length, little-endian), that many bytes of JSON, then the data, without
holes. Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from graftkit.errors import SourceError, reraise_as

# The safetensors library refuses larger headers too.
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# Beyond any real tensor. The product of unlimited sizes could keep Python busy for minutes.
_MAX_DIMENSIONS = 64
_SIZE_LIMIT = 2**63
_BITS = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
        **dict.fromkeys(("F32", "I32", "U32"), 32),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("BOOL", "I8", "U8"), 8),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        "F4": 4,
    }
)

# Returns the first n bytes of a file, or all it has, and the file's size where that is known.
ReadPrefix = Callable[[int], tuple[bytes, int | None]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        dtype: safetensors' name of it: "BF16".
        shape: as stored.
        begin, end: byte range of its data, counted from the start of the file.
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
class FileHeader:
    """The header of one file.

    Attributes:
        raw: the file's bytes up to its data: the header's length and the header itself.
        tensors: tensor name -> dtype, shape and byte range, in the header's order.
        metadata: the file's own metadata, e.g. ``{"format": "pt"}``.
        repeated: names that occur more than once: readers disagree about which one counts.
    """

    raw: bytes = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    metadata: Mapping[str, str]
    repeated: tuple[str, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return max((tensor.end for tensor in self.tensors.values()), default=len(self.raw))


def read_header(path: Path) -> FileHeader:
    """Read the header of a local file.

    Raises:
        SourceError: ``weights-header``: the file cannot be read, or is truncated or malformed.
    """

    def read(length: int) -> tuple[bytes, int]:
        with path.open("rb") as file:
            return file.read(length), path.stat().st_size

    with reraise_as(malformed, path):
        # Reading a pipe or a device would not end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise malformed(str(path), "it is not a regular file")
        return parse_header(read, str(path), LENGTH_BYTES)


def parse_header(read: ReadPrefix, where: str, first: int) -> FileHeader:
    """Parse and check a file's header.

    Args:
        read: reads the file's first bytes.
        where: what errors call the file.
        first: how many bytes to ask for before the header's length is known.

    Raises:
        SourceError: ``weights-header``: the file is truncated or malformed.
    """
    head, size = read(first)
    if len(head) < LENGTH_BYTES:
        raise malformed(where, f"it is truncated: {len(head)} bytes")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    stop = LENGTH_BYTES + length
    # Checked before anything of that length is read.
    if length > MAX_HEADER_BYTES:
        raise malformed(where, f"it claims a header of {length} bytes; it is not a safetensors file")
    if size is not None and stop > size:
        raise malformed(where, f"it is truncated: {size} bytes, and the header alone takes {stop}")
    if len(head) < stop:
        head, _ = read(stop)
    if len(head) < stop:
        raise malformed(where, f"it is truncated: {len(head)} bytes, and the header alone takes {stop}")
    entries, repeated = parse_object(head[LENGTH_BYTES:stop], where)
    metadata = entries.pop("__metadata__", None)
    tensors = {name: _tensor(value, name, stop, where) for name, value in entries.items()}
    _check_layout(tensors, stop, size, where)
    known = metadata if isinstance(metadata, dict) else {}
    texts = {str(name): str(value) for name, value in known.items()}
    return FileHeader(head[:stop], MappingProxyType(tensors), MappingProxyType(texts), tuple(repeated))


def header_bytes(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], data: int) -> bytes:
    """Return the bytes of a file up to its data: the header's length and the header.

    Args:
        tensors: in the order to write them.
        metadata: the file's own metadata, may be empty.
        data: the position that the tensors' byte ranges count as the start of the data.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        offsets = [tensor.begin - data, tensor.end - data]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data starts at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_object(raw: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    """Parse a JSON object, and list the names that one object in it holds more than once.

    Raises:
        SourceError: ``weights-header``: it is not a JSON object.
    """
    try:
        data, repeated = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise malformed(where, f"not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise malformed(where, f"a JSON object was expected, not a {type(data).__name__}")
    return data, repeated


def parse_json(raw: bytes) -> tuple[Any, list[str]]:
    """Parse JSON, and list the names that one object in it holds more than once (the last one counts).

    Raises:
        ValueError: it is not valid JSON, or not text.
        RecursionError: it is nested too deeply.
    """
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            counted = Counter(name for name, _ in items)
            repeated.extend(name for name, times in counted.items() if times > 1)
        return found

    return json.loads(raw, object_pairs_hook=pairs), repeated


def _tensor(value: Any, name: str, data: int, where: str) -> StoredTensor:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise malformed(where, f"the entry of {name!r:.200} has no valid dtype, shape and data_offsets")
    tensor = StoredTensor(dtype, tuple(shape), data + offsets[0], data + offsets[1])
    bits = _BITS.get(dtype)
    # An unknown dtype is passed on: only its size cannot be checked.
    if bits is not None and tensor.nbytes * 8 != tensor.numel * bits:
        raise malformed(where, f"{name!r:.200} has {tensor.nbytes} bytes, which do not match its shape")
    return tensor


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    # `type` rather than isinstance: JSON's true is an int to Python.
    return all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)


def _check_layout(tensors: Mapping[str, StoredTensor], data: int, size: int | None, where: str) -> None:
    """Check that the tensors' data fills the file from ``data`` to its end, without holes or overlaps."""
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position or tensor.end < tensor.begin:
            span = f"{tensor.begin - data} to {tensor.end - data}"
            raise malformed(where, f"{name!r:.200} takes bytes {span}, and must begin at {position - data}")
        position = tensor.end
    if size is not None and position != size:
        state = "it is truncated" if position > size else "it has bytes that no tensor owns"
        described = f"{size - data} bytes of data, and the header describes {position - data}"
        raise malformed(where, f"{state}: {described}")


def malformed(where: str, why: str) -> SourceError:
    """Return the error for a file whose header cannot be used."""
    return SourceError(
        "the weights' header cannot be used",
        where=where,
        why=why,
        help="fetch the file again, and compare its size with the one on the model's page",
        code="weights-header",
    )
