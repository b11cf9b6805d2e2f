"""What is known of the twin of each model class: made by a generator, read here, so that nobody waits for it.

``known_twins.toml`` has one table a class. ``python -m graftkit.twins.write_known`` (``make families``) writes it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_HEADER = """\
# What is known of each model class's twin: `make families` writes it, `make families TYPES=a,b` those types alone.
# `graftkit.families._known_twins.KnownTwin` says what the keys mean.
"""

KNOWN_TWINS = Path(__file__).with_name("known_twins.toml")


@dataclass(frozen=True)
class KnownTwin:
    """One entry of the table.

    Attributes:
        class_name: the model class.
        model_type: the transformers model type that the entry was made with, in its default configuration.
        sources: a hash of the sources that the entry was made from: another one means that it is stale.
        kept: what the twin does not shrink, in the words of ``graftkit.twins.shrink``.
        batch: modality -> input -> expression: the recipe of a batch; empty where none is known.
        unreached: cause -> patterns of the sites that no gradient reaches under this batch, in the words of
            ``graftkit.twins.reaching``.
    """

    class_name: str
    model_type: str
    sources: str
    kept: tuple[str, ...] = ()
    batch: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unreached: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def known_twin(class_name: str) -> KnownTwin | None:
    """Return what is known of the twin of a model class, by the class's name, or None."""
    return known_twins().get(class_name)


@cache
def known_twins() -> Mapping[str, KnownTwin]:
    """Return the table that comes with graftkit, by class name."""
    return read_known_twins(KNOWN_TWINS)


def read_known_twins(path: Path) -> dict[str, KnownTwin]:
    """Return the entries of a table, by class name; none where there is no such file."""
    if not path.is_file():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: _known_twin(name, fields) for name, fields in entries.items()}


def _known_twin(class_name: str, fields: Mapping[str, Any]) -> KnownTwin:
    return KnownTwin(
        class_name,
        fields["model_type"],
        fields["sources"],
        kept=tuple(fields.get("kept", ())),
        batch=fields.get("batch", {}),
        unreached={cause: tuple(patterns) for cause, patterns in fields.get("unreached", {}).items()},
    )


def to_toml(entries: Iterable[KnownTwin]) -> str:
    """Return the table, sorted by class name, one input a line."""
    ordered = sorted(entries, key=lambda entry: entry.class_name)
    return "\n".join([_HEADER, *(_entry_lines(entry) for entry in ordered)])


def _entry_lines(entry: KnownTwin) -> str:
    lines = [f"[{entry.class_name}]"]
    lines += [f"model_type = {json.dumps(entry.model_type)}", f"sources = {json.dumps(entry.sources)}"]
    if entry.kept:
        lines.append(f"kept = {json.dumps(list(entry.kept))}")
    lines += [f"unreached.{cause} = {json.dumps(patterns)}" for cause, patterns in entry.unreached.items()]
    for modality, inputs in entry.batch.items():
        lines += [f"batch.{modality}.{name} = {json.dumps(value)}" for name, value in inputs.items()]
    return "\n".join(lines) + "\n"
