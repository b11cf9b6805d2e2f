"""The names, types and shapes of a checkpoint's tensors, from its safetensors headers alone.

The format: 8 bytes (the header's length, little-endian), that many bytes of JSON, then the data, without
holes. Source: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

from graftkit.errors import SourceError
from graftkit.surveying.sources import hub

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The safetensors library refuses headers above this size too.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# Beyond any real tensor. The product of unlimited sizes could keep Python busy for minutes.
_MAX_DIMENSIONS = 64
_SIZE_LIMIT = 2**63
# Nearly every header fits, so that one request a file is enough. huggingface_hub asks for the same range.
_FIRST_HUB_BYTES = 100_000
_HUB_READERS = 8
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

# The first bytes of a file, as many as asked for or as there are, and the file's size where it is known.
_Read = Callable[[int], tuple[bytes, int | None]]


class TensorHeader(NamedTuple):
    """One stored tensor: its safetensors dtype (``"BF16"``), its shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


# Equality is that of a mapping.
@dataclass(frozen=True, eq=False)
class Headers(Mapping[str, TensorHeader]):
    """A checkpoint's tensors by name, as stored.

    Attributes:
        tensors: tensor name -> dtype, shape and file name, in file order.
        total_bytes: size of all tensor data, without the headers.
        revision: the commit the hub answered with, where there is one.
        metadata: the files' own metadata, e.g. ``{"format": "pt"}``; of several files the last one's counts.
        repeated: names that a header holds more than once: readers disagree about which one counts.
    """

    tensors: Mapping[str, TensorHeader] = field(repr=False)
    total_bytes: int
    revision: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    repeated: tuple[str, ...] = field(default=(), repr=False)

    def __getitem__(self, name: str) -> TensorHeader:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def parameter_count(self) -> int:
        """Stored elements. A packed quantized weight counts as stored, not as it unpacks."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _File(NamedTuple):
    entries: dict[str, _Entry]
    metadata: dict[str, str]
    repeated: list[str]


def read_headers(source: str | Path, *, revision: str | None = None) -> Headers:
    """Read what tensors a checkpoint holds, without reading one of them.

    Args:
        source: a directory with ``model.safetensors`` or ``model.safetensors.index.json``, a
            ``.safetensors`` file, or a hub id. A path that exists wins over a hub id. From the hub only the
            headers are fetched, by range requests; without a connection a cached copy is read.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: ``weights-header`` (a file is truncated or malformed, or the index names what is not
            there), ``weights-not-found`` (no safetensors files), ``not-found``, or one of the hub's codes
            (see :func:`graftkit.surveying.sources.hub.probe`).
    """
    text = str(source)
    path = Path(text).expanduser()
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except OSError:
        # Too long for a path, or not ours to look at: no local file.
        is_file = is_directory = False
    if text and is_file:
        return _headers({path.name: _read_file(path)}, {}, None)
    if text and is_directory:
        return _from_directory(path)
    if isinstance(source, str) and hub.is_hub_id(text):
        return _from_hub(text, revision)
    raise SourceError(
        "no such file, directory or hub id",
        where=text,
        help="pass a model directory, a .safetensors file, or a hub id as owner/name",
        code="not-found",
    )


def _from_directory(path: Path, commit: str | None = None) -> Headers:
    if (path / _SINGLE).is_file():
        return _headers({_SINGLE: _read_file(path / _SINGLE)}, {}, commit)
    if not (path / _INDEX).is_file():
        raise _no_weights(str(path))
    weight_map = _read_index(path / _INDEX, str(path / _INDEX))
    files = {name: _read_file(path / name) for name in _shards(weight_map)}
    return _headers(files, weight_map, commit)


def _no_weights(where: str) -> SourceError:
    return SourceError(
        "no safetensors weights",
        where=where,
        why=f"there is neither {_SINGLE} nor {_INDEX}",
        help="point at a model that was saved with save_pretrained()",
        code="weights-not-found",
    )


def _from_hub(repo_id: str, revision: str | None) -> Headers:
    try:
        return _from_hub_online(repo_id, revision)
    except SourceError as error:
        if error.code != "hub-offline" or (headers := _from_snapshot(repo_id, revision)) is None:
            raise
        return headers


def _from_snapshot(repo_id: str, revision: str | None) -> Headers | None:
    """The headers of the cached weights, or None where the cache does not hold them all."""
    cached = hub.from_cache(repo_id, _SINGLE, revision) or hub.from_cache(repo_id, _INDEX, revision)
    if cached is None:
        return None
    folder = cached.path.parent
    names = (_SINGLE,) if cached.path.name == _SINGLE else _shards(_read_index(cached.path, str(cached.path)))
    return _from_directory(folder, cached.commit) if all((folder / n).is_file() for n in names) else None


def _from_hub_online(repo_id: str, revision: str | None) -> Headers:
    try:
        # The commit of the first answer serves every later request, so that all files are of one version.
        commit = str(hub.probe(repo_id, _SINGLE, revision).commit_hash)
        weight_map: Mapping[str, str] = {}
        names: tuple[str, ...] = (_SINGLE,)
    except SourceError as error:
        if error.code != "hub-no-file":
            raise
        index = _hub_index(repo_id, revision)
        commit, weight_map = index.commit, _read_index(index.path, f"{repo_id}/{_INDEX}")
        names = _shards(weight_map)

    def read(name: str) -> _File:
        where = f"{repo_id}/{name}"
        try:
            return _parse(lambda n: hub.read_prefix(repo_id, name, commit, n), where, _FIRST_HUB_BYTES)
        except SourceError as error:
            if error.code != "hub-no-file":
                raise
            raise _malformed(where, "the index names it, and it is not there") from error

    with ThreadPoolExecutor(_HUB_READERS) as readers:
        files = dict(zip(names, readers.map(read, names), strict=True))
    return _headers(files, weight_map, commit)


def _hub_index(repo_id: str, revision: str | None) -> hub.HubFile:
    try:
        return hub.fetch(repo_id, _INDEX, revision, max_bytes=_MAX_HEADER_BYTES)
    except SourceError as error:
        if error.code != "hub-no-file":
            raise
        raise _no_weights(repo_id) from error


def _read_index(path: Path, where: str) -> Mapping[str, str]:
    """The index's tensor name -> file name, every file name checked to lie beside the index."""
    try:
        if path.stat().st_size > _MAX_HEADER_BYTES:
            raise _malformed(where, f"it is larger than {_MAX_HEADER_BYTES} bytes")
        data, _ = _json(path.read_bytes(), where)
    except OSError as error:
        raise _malformed(where, str(error)) from error
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _malformed(where, "it has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_beside(file):
            raise _malformed(where, f"it names a file outside its own folder: {file!r:.200}")
    return weight_map


def _is_beside(file: str) -> bool:
    # Judged as either system would read it, since an index may come from anywhere.
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    absolute = posix.is_absolute() or bool(windows.anchor)
    return file.endswith(".safetensors") and not absolute and ".." not in windows.parts


def _shards(weight_map: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(weight_map.values())))


def _read_file(path: Path) -> _File:
    def read(length: int) -> tuple[bytes, int]:
        with path.open("rb") as file:
            return file.read(length), path.stat().st_size

    try:
        # Reading a pipe or a device would not end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _malformed(str(path), "it is no regular file")
        return _parse(read, str(path), _LENGTH_BYTES)
    except OSError as error:
        raise _malformed(str(path), f"{type(error).__name__}: {error.strerror}") from error


def _parse(read: _Read, where: str, first: int) -> _File:
    """The checked header of one file. ``first`` is how many bytes to ask for before its length is known."""
    head, size = read(first)
    if len(head) < _LENGTH_BYTES:
        raise _malformed(where, f"it is truncated: {len(head)} bytes")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    stop = _LENGTH_BYTES + length
    # Checked before anything of that length is read.
    if length > _MAX_HEADER_BYTES:
        raise _malformed(where, f"it claims a header of {length} bytes; it is no safetensors file")
    if size is not None and stop > size:
        raise _malformed(where, f"it is truncated: {size} bytes, and the header alone takes {stop}")
    if len(head) < stop:
        head, _ = read(stop)
    if len(head) < stop:
        raise _malformed(where, f"it is truncated: {len(head)} bytes, and the header alone takes {stop}")
    data, repeated = _json(head[_LENGTH_BYTES:stop], where)
    metadata = data.pop("__metadata__", None)
    entries = {tensor: _entry(value, tensor, where) for tensor, value in data.items()}
    _check_layout(entries, None if size is None else size - stop, where)
    known = metadata if isinstance(metadata, dict) else {}
    return _File(entries, {str(name): str(value) for name, value in known.items()}, repeated)


def _json(raw: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, and the names that one object in it holds more than once."""
    try:
        data, repeated = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise _malformed(where, f"a JSON object was expected, not a {type(data).__name__}")
    return data, repeated


def parse_json(raw: bytes) -> tuple[Any, list[str]]:
    """Parse JSON, and list the names that one object in it holds more than once (the last one counts).

    Raises:
        ValueError: it is no JSON, or no text.
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


def _entry(value: Any, tensor: str, where: str) -> _Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise _malformed(where, f"the entry of {tensor!r:.200} has no valid dtype, shape and data_offsets")
    entry = _Entry(dtype, tuple(shape), offsets[0], offsets[1])
    bits = _BITS.get(entry.dtype)
    # A type this version does not know is passed on: only its size cannot be checked.
    if bits is not None and (entry.end - entry.begin) * 8 != math.prod(entry.shape) * bits:
        raise _malformed(where, f"{tensor!r:.200} has {entry.end - entry.begin} bytes, which its shape denies")
    return entry


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    # `type` rather than isinstance: JSON's true is an int to Python.
    return all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)


def _check_layout(entries: Mapping[str, _Entry], data_bytes: int | None, where: str) -> None:
    position = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position or entry.end < entry.begin:
            what = "overlaps another tensor" if entry.begin < position else "does not follow the one before"
            raise _malformed(where, f"the data of {tensor!r:.200} {what}")
        position = entry.end
    if data_bytes is not None and position != data_bytes:
        state = "it is truncated" if position > data_bytes else "it has bytes that no tensor owns"
        raise _malformed(where, f"{state}: {data_bytes} bytes of data, and the header describes {position}")


def _headers(files: Mapping[str, _File], weight_map: Mapping[str, str], commit: str | None) -> Headers:
    """Merge the files' headers. Where two files hold a tensor, the index says which of them counts."""
    for tensor, file in weight_map.items():
        if tensor not in files[file].entries:
            raise _malformed(file, f"it does not hold {tensor!r:.200}, which the index says it does")
    tensors: dict[str, TensorHeader] = {}
    total = 0
    for file, read in files.items():
        for tensor, entry in read.entries.items():
            if weight_map.get(tensor, file) != file:
                continue
            tensors[tensor] = TensorHeader(entry.dtype, entry.shape, file)
            total += entry.end - entry.begin
    metadata = {name: value for read in files.values() for name, value in read.metadata.items()}
    repeated = tuple(name for read in files.values() for name in read.repeated)
    return Headers(MappingProxyType(tensors), total, commit, MappingProxyType(metadata), repeated)


def _malformed(where: str, why: str) -> SourceError:
    return SourceError(
        "the weights' header cannot be used",
        where=where,
        why=why,
        help="fetch the file again, and compare its size with the one on the model's page",
        code="weights-header",
    )
