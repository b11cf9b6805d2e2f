"""The names, dtypes and shapes of a checkpoint's tensors, from its safetensors headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import NamedTuple

from graftkit.errors import SourceError, reraise_as
from graftkit.surveying.checkpoint.safetensors_header import (
    MAX_HEADER_BYTES,
    FileHeader,
    malformed,
    parse_header,
    parse_object,
    read_header,
)
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.hub_errors import weights_not_local
from graftkit.surveying.sources.local import existing_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Nearly every header fits, so that one request a file is enough. huggingface_hub asks for the same range.
_FIRST_HUB_BYTES = 100_000
_HUB_READERS = 8


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
        files: file name -> its own header.
    """

    tensors: Mapping[str, TensorHeader] = field(repr=False)
    total_bytes: int
    revision: str | None = None
    files: Mapping[str, FileHeader] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> TensorHeader:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_headers(source: str | Path, *, revision: str | None = None) -> Headers:
    """Read what tensors a checkpoint holds, without reading one of them.

    Args:
        source: a directory with ``model.safetensors`` or ``model.safetensors.index.json``, a
            ``.safetensors`` file, or a hub id. A path that exists wins over a hub id. From the hub only the
            headers are fetched, by range requests; without a connection a cached copy is read.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: ``weights-header`` (a file is truncated or malformed, or the index names what is not
            there), ``weights-not-found`` (no safetensors files), ``weights-not-local`` (the hub cannot be
            reached, and they are not all in the cache), ``not-found``, or one of the hub's codes (see
            :func:`graftkit.surveying.sources.hub.file_metadata`).
    """
    text = str(source)
    path = existing_path(text)
    if path is not None and path.is_file():
        return _headers({path.name: read_header(path)}, {}, None)
    if path is not None and path.is_dir():
        return _from_directory(path)
    if isinstance(source, str) and hub.is_hub_id(text):
        return _from_hub(text, revision)
    raise SourceError(
        "no such file, directory or hub id",
        where=text,
        why="there is no file or folder of that name, and a hub id has the form owner/name",
        help="pass a model directory, a .safetensors file, or a hub id as owner/name",
        code="not-found",
    )


def _from_directory(path: Path, commit: str | None = None) -> Headers:
    if (path / SINGLE).is_file():
        return _headers({SINGLE: read_header(path / SINGLE)}, {}, commit)
    if not (path / INDEX).is_file():
        raise _no_weights(str(path))
    weight_map = _read_index(path / INDEX, str(path / INDEX))
    files = {name: read_header(path / name) for name in _shards(weight_map)}
    return _headers(files, weight_map, commit)


def _no_weights(where: str) -> SourceError:
    return SourceError(
        "no safetensors weights",
        where=where,
        why=f"there is neither {SINGLE} nor {INDEX}",
        help="point at a model that was saved with save_pretrained()",
        code="weights-not-found",
    )


def _from_hub(repo_id: str, revision: str | None) -> Headers:
    try:
        return _from_hub_online(repo_id, revision)
    except SourceError as error:
        if error.code != "hub-offline":
            raise
        cached = cached_weights(repo_id, revision)
        if cached is None:
            raise weights_not_local(repo_id, revision, error.why) from error
        return _from_directory(cached.path.parent, cached.commit)


def cached_weights(repo_id: str, revision: str | None = None) -> hub.HubFile | None:
    """Return the cached single file or index of a repository's weights, or None if not all files are cached."""
    cached = hub.from_cache(repo_id, SINGLE, revision) or hub.from_cache(repo_id, INDEX, revision)
    if cached is None:
        return None
    names = (SINGLE,) if cached.path.name == SINGLE else _shards(_read_index(cached.path, str(cached.path)))
    return cached if all((cached.path.parent / name).is_file() for name in names) else None


def _from_hub_online(repo_id: str, revision: str | None) -> Headers:
    try:
        # The commit of the first answer serves every later request, so that all files are of one version.
        commit = str(hub.file_metadata(repo_id, SINGLE, revision).commit_hash)
        weight_map: Mapping[str, str] = {}
        names: tuple[str, ...] = (SINGLE,)
    except SourceError as error:
        if error.code != "hub-no-file":
            raise
        index = _hub_index(repo_id, revision)
        commit, weight_map = index.commit, _read_index(index.path, f"{repo_id}/{INDEX}")
        names = _shards(weight_map)

    def read(name: str) -> FileHeader:
        where = f"{repo_id}/{name}"
        try:
            return parse_header(lambda n: hub.read_prefix(repo_id, name, commit, n), where, _FIRST_HUB_BYTES)
        except SourceError as error:
            if error.code != "hub-no-file":
                raise
            raise malformed(where, "the index names it, and it is not there") from error

    with ThreadPoolExecutor(_HUB_READERS) as readers:
        files = dict(zip(names, readers.map(read, names), strict=True))
    return _headers(files, weight_map, commit)


def _hub_index(repo_id: str, revision: str | None) -> hub.HubFile:
    try:
        return hub.fetch(repo_id, INDEX, revision, max_bytes=MAX_HEADER_BYTES)
    except SourceError as error:
        if error.code != "hub-no-file":
            raise
        raise _no_weights(repo_id) from error


def _read_index(path: Path, where: str) -> Mapping[str, str]:
    """Return the index's tensor name -> file name, every file name checked to lie beside the index."""
    with reraise_as(malformed, where):
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise malformed(where, f"it is larger than {MAX_HEADER_BYTES} bytes")
        data, _ = parse_object(path.read_bytes(), where)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise malformed(where, "it has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_beside(file):
            raise malformed(where, f"it names a file outside its own folder: {file!r:.200}")
    return weight_map


def _is_beside(file: str) -> bool:
    # Judged as either system would read it, since an index may come from anywhere.
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    absolute = posix.is_absolute() or bool(windows.anchor)
    return file.endswith(".safetensors") and not absolute and ".." not in windows.parts


def _shards(weight_map: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(weight_map.values())))


def _headers(files: Mapping[str, FileHeader], weight_map: Mapping[str, str], commit: str | None) -> Headers:
    """Merge the files' headers. Where two files hold a tensor, the index says which of them counts."""
    for tensor, file in weight_map.items():
        if tensor not in files[file].tensors:
            raise malformed(file, f"it does not hold {tensor!r:.200}, which the index says it does")
    tensors: dict[str, TensorHeader] = {}
    total = 0
    for file, header in files.items():
        for tensor, stored in header.tensors.items():
            if weight_map.get(tensor, file) != file:
                continue
            tensors[tensor] = TensorHeader(stored.dtype, stored.shape, file)
            total += stored.nbytes
    return Headers(MappingProxyType(tensors), total, commit, MappingProxyType(dict(files)))
