"""The tables of releases: which classes take LoRA, under which names, and where the source says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from packaging.version import Version

_FORMAT = 1


@dataclass(frozen=True)
class ClassSupport:
    """What one release says of one class of models. What its source does not say is None or empty.

    Attributes:
        lora: whether the class takes LoRA at all; None where no class says.
        source: file and line.
        packed: the engine's module -> the projections that it computes as one.
        embeddings: the embeddings and output layers that take LoRA.
        towers: whether LoRA on towers and connectors can be switched on; None for a class of text alone.
        stacked: whether stacked experts are read as transformers stacks them; None where it has none.
        raw: last parts of the names of weights that are multiplied without looking for an adapter.
        mixed: those for which that holds in some branches only.
        arch: what the engine calls the architecture, where it is not the class's name.
    """

    lora: bool | None
    source: str
    packed: Mapping[str, tuple[str, ...]] | None = None
    embeddings: tuple[str, ...] | None = None
    towers: bool | None = None
    stacked: bool | None = None
    raw: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    arch: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that say something."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}


@dataclass(frozen=True)
class ReleaseTable:
    """The classes of one release, by what a configuration has in ``architectures``, or as ``model_type``."""

    engine: str
    version: Version
    classes: Mapping[str, ClassSupport]

    def to_json(self) -> str:
        """Return the table as its file has it, one class a line."""
        lines = [f"  {json.dumps(name)}: {json.dumps(s.to_dict())}" for name, s in sorted(self.classes.items())]
        head = f'"format": {_FORMAT}, "engine": "{self.engine}", "version": "{self.version}"'
        return "{" + head + ', "classes": {\n' + ",\n".join(lines) + "\n}}\n"


def table_name(engine: str, version: Version) -> str:
    """Return the name of a table's file."""
    return f"{engine}-{version}.json"


@cache
def released() -> tuple[tuple[str, Version, Traversable], ...]:
    """Return the engine, the version and the file of every table."""
    found = [file for file in files(__package__).joinpath("data").iterdir() if file.name.endswith(".json")]
    names = [file.name.removesuffix(".json").rpartition("-") for file in found]
    return tuple((engine, Version(number), file) for (engine, _, number), file in zip(names, found, strict=True))


@cache
def read_table(engine: str, version: Version) -> ReleaseTable | None:
    """Return the table of one release, or None where there is none. A release candidate has its release's."""
    wanted = (engine, Version(version.base_version))
    found = next((file for name, number, file in released() if (name, number) == wanted), None)
    return None if found is None else parse_table(found.read_text(encoding="utf-8"))


def parse_table(text: str) -> ReleaseTable:
    """Read a table from its file's text."""
    raw = json.loads(text)
    classes = {name: _support(entry) for name, entry in raw["classes"].items()}
    return ReleaseTable(raw["engine"], Version(raw["version"]), classes)


def _support(entry: Mapping[str, Any]) -> ClassSupport:
    given = {"lora": None, **entry}
    if "packed" in given:
        given["packed"] = {name: tuple(parts) for name, parts in given["packed"].items()}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return ClassSupport(**{**given, **lists})
