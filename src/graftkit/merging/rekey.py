"""``rekey()``: a copy of a base whose tensors have the names that its class loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftkit._version import SCHEMA_VERSION
from graftkit.errors import MergeError
from graftkit.files import as_output_error, atomic_folder, overlap, write_text
from graftkit.merging.checkpoint.base import Base, open_base
from graftkit.merging.checkpoint.shards import Shard
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.read import copy_file, opened
from graftkit.merging.io.staging import check_space, sync
from graftkit.surveying.checkpoint.complete import check_complete
from graftkit.surveying.checkpoint.headers import INDEX
from graftkit.surveying.checkpoint.safetensors_header import header_bytes
from graftkit.text import quoted, some


@dataclass(frozen=True)
class Rekeying:
    """A re-keyed copy of a base.

    Attributes:
        base, out: the folder that was read, and the one that was written.
        renamed: key in the base's files -> key in the copy.
        buffers: saved buffers of the class that no file has; they keep the value of the class.
    """

    base: Path
    out: Path
    renamed: Mapping[str, str] = field(repr=False)
    buffers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "base": str(self.base),
            "out": str(self.out),
            "renamed": dict(self.renamed),
            "missing_buffers": list(self.buffers),
        }

    def __str__(self) -> str:
        key, name = next(iter(self.renamed.items()))
        lines = [
            f"{len(self.renamed)} tensors renamed in {self.out}, as {quoted(key)} to {quoted(name)}",
            "all weights of the class load from it",
        ]
        if self.buffers:
            lines.append(f"{len(self.buffers)} buffers are in no file, and keep the class's: {some(self.buffers)}")
        return "\n".join(lines)


def rekey(
    base: str | Path, out: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> Rekeying:
    """Write a copy of a base in which each weight has the name that the class loads it under.

    Only names change: data, order, dtypes, metadata and all other files are the base's. A weight is recognised by
    its name with or without a wrapper's part (``q_proj.weight``, ``q_proj.linear.weight``) and by its shape, and
    nothing is written unless every weight of the class then loads.

    Args:
        base: a folder, or a hub id.
        out: a folder that does not exist, or is empty.
        trust_remote_code: run model code that comes with the base.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError, BuildError: the base cannot be read; ``weights-incomplete``: other names are not all that is
            wrong.
        MergeError: ``rekey-not-needed``: no weight has another name; ``rekey-undecided``: the files could not be
            compared with the class; ``merge-same-place``: the output overlaps with the base.
        OutputError: the output cannot be written.
    """
    found = open_base(base, trust_remote_code=trust_remote_code, revision=revision)
    target = Path(out).expanduser().resolve()
    renamed = _renamed(found, target)
    # No file marks a folder that may be replaced: a base is never written over.
    with atomic_folder(target, marker="") as folder, as_output_error(target):
        check_space(target, found.weights.file_bytes)
        for shard in found.weights.shards:
            _write_shard(shard, renamed, folder / shard.name)
        for path in found.companions:
            with opened(path, base_unreadable) as file:
                copy_file(file, folder / path.name)
        if found.weights.index is not None:
            write_text(folder / INDEX, json.dumps(_index(found.weights.index, renamed), indent=2) + "\n")
    return Rekeying(found.folder, target, renamed, found.compared.absent.buffers)


def _renamed(base: Base, target: Path) -> Mapping[str, str]:
    """Return the renamings, after everything that can be refused before a byte is written."""
    if overlap(target, base.folder):
        raise MergeError(
            "the output overlaps with the base",
            where=str(target),
            help="name another folder",
            code="merge-same-place",
        )
    compared = base.compared
    if compared.renamed:
        return MappingProxyType(dict(compared.renamed))
    check_complete(compared, str(base.folder))
    if compared.undecided is not None:
        raise MergeError(
            "the base's files cannot be compared with its class",
            where=str(base.folder),
            why=compared.undecided,
            help="save the model from memory under its own names: model.save_pretrained(folder)",
            code="rekey-undecided",
        )
    raise MergeError(
        "nothing to rename: the class loads every weight of this base",
        where=str(base.folder),
        help="use it as it is",
        code="rekey-not-needed",
    )


def _write_shard(shard: Shard, renamed: Mapping[str, str], path: Path) -> None:
    old = shard.header
    tensors = {renamed.get(name, name): stored for name, stored in old.tensors.items()}
    header = header_bytes(tensors, old.metadata, len(old.raw))
    with opened(shard.path, base_unreadable) as source:
        copy_file(source, path, begin=len(old.raw), head=header)
    sync(path)


def _index(index: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    weight_map = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
    return {**index, "weight_map": weight_map}
