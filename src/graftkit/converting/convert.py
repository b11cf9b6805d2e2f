"""``convert()``: an adapter in the form that an engine reads, proven equal before it is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit._version import SCHEMA_VERSION, __version__
from graftkit.adapters.file import CONFIG_NAME, RECORD_NAME
from graftkit.adapters.migrate import companions
from graftkit.adapters.record import Dialect, mark_dialect, read_record
from graftkit.converting.base import ConvertBase, open_convert_base
from graftkit.converting.delta import Deltas
from graftkit.converting.dialects import DialectFormat, dialect_named, dialect_of
from graftkit.converting.dialects._refused import notes_on
from graftkit.converting.errors import ConvertError, merge_instead
from graftkit.converting.join import read_whole
from graftkit.converting.prove_equal import Proof, not_equal, prove_equal
from graftkit.errors import AdapterError, MergeError, reraise_as
from graftkit.files import overlap, write_text
from graftkit.merging.errors import adapter_unreadable
from graftkit.merging.io.read import copy_file, opened
from graftkit.merging.io.staging import StagingDir, check_space, merge_stopped, staging_dir, sync
from graftkit.progress import Progress
from graftkit.text import some

REPORT_NAME = "conversion_report.json"
# What describes an adapter in one form only.
_OWN = frozenset({CONFIG_NAME, RECORD_NAME, REPORT_NAME})
# Refusals of adapters that change no weights, or that start from weights that are lost: merging refuses them, too.
_NO_UPDATE = frozenset(
    {"merge-prompt", "merge-depends-on-input", "merge-layer-replication", "merge-base-lost", "merge-no-bias"}
)
# What a converted file may be larger than the original: experts that are written one by one, doubled ranks.
_GROWTH = 4


@dataclass(frozen=True)
class Conversion:
    """A completed conversion.

    Attributes:
        adapter, out: the folder that was read, and the one that was written.
        base: as the user, or the adapter, named it.
        source, to: the dialects, by name.
        proof: what comparing the result with the original found.
        notes: what it still depends on: options of the server, and what nobody has looked at.
        files: names of the files in ``out``.
        resumed: whether an earlier, interrupted run had written the tensors.
    """

    adapter: Path
    out: Path
    base: str
    source: str
    to: str
    proof: Proof
    notes: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    resumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "graftkit": __version__,
            "adapter": str(self.adapter),
            "out": str(self.out),
            "base": self.base,
            "from": self.source,
            "to": self.to,
            "proof": self.proof.to_dict(),
            "notes": list(self.notes),
            "files": list(self.files),
            "resumed": self.resumed,
        }

    def __str__(self) -> str:
        lines = [f"{self.adapter} ({self.source}) -> {self.out} ({self.to})", str(self.proof)]
        if self.proof.padding:
            lines.append(f"{self.proof.padding} pairs of zeros fill up groups that {self.to} takes whole")
        return "\n".join([*lines, *self.notes])


def convert(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Write an adapter in the form that an engine reads, or back in stock PEFT's.

    The result is read back as the engine reads it, and compared with the original, matrix by matrix: it appears
    only if each update is the same, exactly or within the rounding that its dialect states. Memory holds one
    module at a time. After an interrupt the same call reuses the tensors that were written.

    Args:
        adapter: a folder in any dialect; ``graftkit.json`` in it, or else its files, tell which.
        out: a folder that does not exist, is empty, or contains an earlier conversion.
        to: "vllm", "sglang", "llama.cpp", "mlx" or "peft".
        base: what it was trained on: a folder, a ``config.json``, a model type or a hub id. Its weights are read
            only for an adapter whose update depends on them. None: what the adapter names.
        trust_remote_code: run model code that comes with the base.
        revision: branch, tag or commit of a hub id.
        on_progress: called at each step.

    Returns:
        What was written, and the proof that it is equal.

    Raises:
        ConvertError: ``convert-unknown`` (no such dialect), ``convert-not-needed`` (it is in that form already),
            ``convert-unsupported`` (the form has no place for part of the adapter: the help has the command that
            merges it), ``convert-not-equal``, ``convert-no-base``, ``convert-in-place``, ``convert-busy``.
        AdapterError, MergeError: the adapter cannot be read, or does not fit the base.
        SourceError, BuildError: the base cannot be found or built.
        OutputError: the output cannot be written, or would replace files that are not from a conversion.
    """
    target_form = dialect_named(to)
    folder, target = Path(adapter).expanduser(), Path(out).expanduser().resolve()
    _check_apart(folder, target)
    source = dialect_of(folder)
    if source is target_form and source.name != Dialect.PEFT:
        raise _not_needed(folder, source)
    name = str(base) if base is not None else _base_of(folder, source)
    known = open_convert_base(name, trust_remote_code=trust_remote_code, revision=revision)
    tell = _Steps(on_progress)
    tell("read")
    original = _read(source, folder, known, target_form)
    _refuse(original, target_form, known, folder)
    with staging_dir(target, REPORT_NAME, ConvertError) as staging:
        check_space(target, _GROWTH * _bytes(folder))
        job = _Job(folder, known, target_form, original, staging)
        tell("write")
        resumed = job.write()
        tell("compare")
        proof = job.prove()
        job.copy_companions()
        files = (*sorted(path.name for path in staging.files.iterdir()), RECORD_NAME, REPORT_NAME)
        notes = notes_on(original, known, target_form.engine) if target_form.engine is not None else ()
        done = Conversion(folder, target, name, source.name, target_form.name, proof, notes, files, resumed)
        mark_dialect(staging.files, Dialect(target_form.name), read_record(folder))
        write_text(staging.files / REPORT_NAME, json.dumps(done.to_dict(), indent=2) + "\n")
        with reraise_as(merge_stopped, target):
            staging.publish()
    return done


@dataclass(frozen=True)
class _Steps:
    on_progress: Callable[[Progress], None] | None
    names: tuple[str, ...] = ("read", "write", "compare")

    def __call__(self, name: str) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(name, self.names.index(name), len(self.names)))


@dataclass(frozen=True)
class _Job:
    """One conversion, inside its staging folder."""

    folder: Path
    base: ConvertBase
    to: DialectFormat
    original: Deltas
    staging: StagingDir

    def write(self) -> bool:
        """Write the files, and return whether an interrupted run had written them."""
        fingerprint = _fingerprint(self.folder, self.base, self.to)
        if self.to.weights_name in self.staging.start(fingerprint):
            return True
        with reraise_as(merge_stopped, self.staging.target):
            self.to.write(self.original, self.base, self.staging.files)
            written = sorted(self.staging.files.iterdir())
            for path in written:
                sync(path)
        self.staging.record(fingerprint, {path.name: None for path in written})
        return False

    def copy_companions(self) -> None:
        """Copy model card, tokenizer and chat template, which are the same in every form."""
        with reraise_as(merge_stopped, self.staging.target):
            for path in companions(self.folder):
                if path.name not in _OWN and not (self.staging.files / path.name).exists():
                    with opened(path, adapter_unreadable) as file:
                        copy_file(file, self.staging.files / path.name)

    def prove(self) -> Proof:
        try:
            written = self.to.read_back(self.staging.files, self.base)
        except (AdapterError, MergeError) as error:
            raise not_equal(error.where or str(self.staging.target), error.why or error.what) from error
        return prove_equal(self.original, written, self.to, self.base)


def _check_apart(folder: Path, target: Path) -> None:
    if overlap(folder.resolve(), target):
        raise ConvertError(
            "an adapter cannot be converted in place",
            where=str(target),
            why="the output and the adapter's folder overlap",
            help="name another folder",
            code="convert-in-place",
        )


def _not_needed(folder: Path, source: DialectFormat) -> ConvertError:
    return ConvertError(
        f"the adapter is in {source.name}'s form already",
        where=str(folder),
        why=f"its {RECORD_NAME}, or its files, say so",
        help="use it as it is, or name another form",
        code="convert-not-needed",
    )


def _base_of(folder: Path, source: DialectFormat) -> str:
    """Return the base that an adapter names.

    Raises:
        ConvertError: ``convert-no-base``.
    """
    record = read_record(folder)
    stated = record.base.id if record is not None and record.base is not None else None
    name = source.base_of(folder) or stated
    if name:
        return name
    raise ConvertError(
        "the adapter does not say what its base is",
        where=str(folder),
        help="name it: --base MODEL",
        code="convert-no-base",
    )


def _read(source: DialectFormat, folder: Path, base: ConvertBase, to: DialectFormat) -> Deltas:
    """Read the adapter.

    Raises:
        ConvertError: ``convert-unsupported``: its update depends on the input, or on weights that are
            lost.
        AdapterError, MergeError: it cannot be read, or does not fit.
    """
    try:
        return read_whole(source, folder, base)
    except MergeError as error:
        if error.code not in _NO_UPDATE:
            raise
        raise ConvertError(
            f"the adapter has no form that {to.name} reads",
            where=error.where,
            why=error.why,
            help=error.help,
            code="convert-unsupported",
        ) from error


def _refuse(original: Deltas, to: DialectFormat, base: ConvertBase, folder: Path) -> None:
    """Refuse an adapter that the dialect cannot hold.

    Raises:
        ConvertError: ``convert-unsupported``.
    """
    reasons = to.refusals(original, base)
    if not reasons and original.factors:
        return
    where, why = next(iter(reasons.items()), (str(folder), "it has no low-rank update"))
    more = f" ({len(reasons)} in all: {some(reasons)})" if len(reasons) > 1 else ""
    raise ConvertError(
        f"the adapter has no form that {to.name} reads",
        where=where,
        why=f"{why}{more}",
        help=merge_instead(str(folder), base.source),
        code="convert-unsupported",
    )


def _bytes(folder: Path) -> int:
    with reraise_as(adapter_unreadable, folder):
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _fingerprint(folder: Path, base: ConvertBase, to: DialectFormat) -> str:
    """Hash what a conversion depends on: what an interrupted run wrote is reused only by the same."""
    with reraise_as(adapter_unreadable, folder):
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    said = [__version__, str(folder.resolve()), files, base.model.config.to_json_string(), to.name]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
