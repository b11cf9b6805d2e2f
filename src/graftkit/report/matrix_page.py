"""The matrix of families, methods and checks as one self-contained page."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import jinja2

_DATA = re.compile(r'<script type="text/plain" id="data">([^<]*)</script>')
_MODALITIES = ("text", "image", "video", "audio")


@dataclass(frozen=True)
class MatrixCell:
    """One check of one family under one method.

    Attributes:
        verdict: one of those of :class:`MatrixKey`.
        codes: the rules or errors that decided it.
        evidence: figure -> value.
        seconds: what it took.
        versions: distribution -> version.
        command: what repeats it.
    """

    check: str
    verdict: str
    command: str
    codes: tuple[str, ...] = ()
    message: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class MatrixRun:
    """One family under one method: the verdict that its checks come to, and the checks."""

    method: str
    outcome: str
    cells: tuple[MatrixCell, ...]


@dataclass(frozen=True)
class MatrixFamily:
    """One model type.

    Attributes:
        model_class: the class that is built, or None where there is none.
        introduced: the release of transformers that brought the type, or None where that is not known.
    """

    model_type: str
    model_class: str | None
    modalities: tuple[str, ...]
    runs: tuple[MatrixRun, ...]
    introduced: str | None = None


@dataclass(frozen=True)
class MatrixKey:
    """What the words of a matrix mean, in the order in which the page shows them.

    Attributes:
        verdicts: verdict -> what it says, the best first. Each has a style of its name in ``matrix.css``.
        checks: check -> what it tries.
        proof: the checks that a family has to pass to have the best outcome.
        uncounted: verdicts that say nothing for or against: totals leave them out.
        methods: the methods that come first; the page opens with the first of them.
        released: release of transformers -> the day it was made (ISO 8601), oldest first.
    """

    verdicts: Mapping[str, str]
    checks: Mapping[str, str]
    proof: tuple[str, ...]
    uncounted: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("lora",)
    released: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """Return the verdict that is counted as a success."""
        return next(iter(self.verdicts))


_T = TypeVar("_T", bound=Hashable)


class _Table(Generic[_T]):
    """Values in the order of their first use, each kept once; the data name them by index."""

    def __init__(self) -> None:
        self._index: dict[_T, int] = {}

    def __call__(self, value: _T) -> int:
        return self._index.setdefault(value, len(self._index))

    @property
    def values(self) -> list[_T]:
        return list(self._index)


class _Encoder:
    """Families as compact lists: verdicts, texts, names of figures and versions by index, defaults left out."""

    def __init__(self, families: Sequence[MatrixFamily], key: MatrixKey) -> None:
        self.checks = _in_order(key.checks, (c.check for f in families for r in f.runs for c in r.cells))
        self.methods = _in_order(key.methods, (r.method for f in families for r in f.runs))
        self.modalities = _in_order(_MODALITIES, (m for f in families for m in f.modalities))
        self._verdicts = list(key.verdicts)
        self._messages: _Table[str] = _Table()
        self._commands: _Table[str] = _Table()
        self._codes: _Table[str] = _Table()
        self._figures: _Table[tuple[str, ...]] = _Table()
        self._versions: _Table[tuple[tuple[str, str], ...]] = _Table()
        self._key = key
        self._families = [self._family(family) for family in families]

    def encode(self) -> dict[str, Any]:
        """Return the page's data: lists and numbers, as ``matrix.js`` reads them."""
        return {
            "verdicts": self._verdicts,
            "uncounted": [self._verdicts.index(verdict) for verdict in self._key.uncounted],
            "checks": [[check, self._key.checks.get(check, "")] for check in self.checks],
            "proof": [check for check in self._key.proof if check in self.checks],
            "released": dict(self._key.released),
            "methods": self.methods,
            "modalities": self.modalities,
            "messages": self._messages.values,
            "commands": self._commands.values,
            "codes": self._codes.values,
            "figures": self._figures.values,
            "versions": [dict(versions) for versions in self._versions.values],
            "families": self._families,
        }

    def _family(self, family: MatrixFamily) -> list[Any]:
        if family.introduced is not None and family.introduced not in self._key.released:
            raise ValueError(f"{family.model_type}: {family.introduced!r} is not a release of the key")
        modalities = [self.modalities.index(name) for name in family.modalities]
        runs = sorted(family.runs, key=lambda run: self.methods.index(run.method))
        encoded = [self._run(family.model_type, run) for run in runs]
        return [family.model_type, family.model_class or "", modalities, family.introduced or "", encoded]

    def _run(self, model_type: str, run: MatrixRun) -> list[Any]:
        cells = {cell.check: cell for cell in run.cells}
        listed = [cells.get(check) for check in self.checks]
        return [
            self.methods.index(run.method),
            self._verdict(run.outcome),
            "".join(self._verdict(cell.verdict) if cell else "." for cell in listed),
            [_rounded(cell.seconds, 2) if cell else 0 for cell in listed],
            [self._messages(cell.message) if cell else 0 for cell in listed],
            self._extras(model_type, run.method, listed),
        ]

    def _verdict(self, verdict: str) -> str:
        """Return one digit.

        Raises:
            ValueError: the key has no such verdict.
        """
        return str(self._verdicts.index(verdict))

    def _extras(self, model_type: str, method: str, cells: Sequence[MatrixCell | None]) -> dict[str, Any]:
        """Return what few cells have, by kind and check: codes, figures, other versions, seeds and commands."""
        extras: dict[str, dict[int, Any]] = {}
        for place, cell in enumerate(cells):
            for kind, value in self._extras_of(model_type, method, cell) if cell else ():
                extras.setdefault(kind, {})[place] = value
        return extras

    def _extras_of(self, model_type: str, method: str, cell: MatrixCell) -> Iterator[tuple[str, Any]]:
        if cell.codes:
            yield "codes", [self._codes(code) for code in cell.codes]
        if cell.evidence:
            yield "figures", [self._figures(tuple(cell.evidence)), *map(_figure, cell.evidence.values())]
        if versions := self._versions(tuple(sorted(cell.versions.items()))):
            yield "versions", versions
        if cell.seed:
            yield "seed", cell.seed
        names = {model_type: "{family}", method: "{method}", cell.check: "{check}"}
        if command := self._commands(" ".join(names.get(word, word) for word in cell.command.split(" "))):
            yield "command", command


def _in_order(first: Iterable[str], found: Iterable[str]) -> list[str]:
    """Return what was found, the well-known names first and in their order."""
    names = dict.fromkeys(found)
    known = [name for name in first if name in names]
    return known + [name for name in names if name not in known]


def _rounded(value: float, digits: int) -> float | int:
    """Return a number with so many significant digits; small whole ones as integers, which are shorter as text."""
    cut = float(f"{value:.{digits}g}")
    if not math.isfinite(cut):  # the largest numbers may be rounded up beyond what a float holds
        return value
    return int(cut) if cut.is_integer() and abs(cut) < 1e15 else cut


def _figure(value: Any) -> float | int | str:
    """Return one figure as a page shows it: numbers with three digits, lists and mappings as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return _rounded(value, 3) if math.isfinite(value) else str(value)
    if isinstance(value, int | str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_nested(item)}" for name, item in value.items())
    if isinstance(value, Iterable):
        return ", ".join(str(_nested(item)) for item in value)
    return str(value)


def _nested(value: Any) -> float | int | str:
    figure = _figure(value)
    return f"({figure})" if isinstance(value, Mapping) else figure


@dataclass(frozen=True)
class Share:
    """How many families came to what.

    Attributes:
        name: of a method, a modality or a check; "" for all families.
        counts: verdict -> number of families.
    """

    name: str
    best: str
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Return the number of families."""
        return sum(self.counts.values())

    @property
    def proven(self) -> int:
        """Return the number of families with the best verdict."""
        return self.counts.get(self.best, 0)


class _Shares:
    """Count the outcomes and verdicts of families, without the verdicts that no total counts."""

    def __init__(self, families: Sequence[MatrixFamily], key: MatrixKey) -> None:
        self._families = families
        self._key = key

    def of_method(self, method: str, modality: str | None = None) -> Share:
        """Count the outcomes of one method, of all families or of those with one modality."""
        families = [f for f in self._families if modality is None or modality in f.modalities]
        return self._share(modality or method, (r.outcome for f in families for r in f.runs if r.method == method))

    def of_check(self, method: str, check: str) -> Share:
        """Count the verdicts of one check under one method."""
        runs = [run for family in self._families for run in family.runs if run.method == method]
        return self._share(check, (c.verdict for run in runs for c in run.cells if c.check == check))

    def _share(self, name: str, verdicts: Iterable[str]) -> Share:
        counted = (verdict for verdict in verdicts if verdict not in self._key.uncounted)
        return Share(name, self._key.best, Counter(counted))


def render_matrix(
    families: Sequence[MatrixFamily], key: MatrixKey, generated: str, docs: str | None = None
) -> str:
    """Render the page. It loads nothing; without JavaScript it is a summary and a table of the first method.

    Args:
        families: in the order in which they are shown.
        generated: one line for those who read the source: from what it is made, and how.
        docs: the address of the folder with the explanation and the pages of rules, relative to the page; without
            it, codes are not links.

    Raises:
        ValueError: there is no family, or a verdict or release that the key lacks.
    """
    if not families:
        raise ValueError("a matrix without families has no page")
    encoder, shares = _Encoder(families, key), _Shares(families, key)
    first = encoder.methods[0]
    script = _template("matrix.js")
    return (
        _environment()
        .get_template("matrix.html.j2")
        .render(
            generated=generated,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=_template("matrix.css"),
            data=_packed(encoder.encode() | {"docs": docs}),
            docs=docs,
            key=key,
            first=first,
            overall=shares.of_method(first),
            checks=[shares.of_check(first, check) for check in encoder.checks],
            methods=[shares.of_method(method) for method in encoder.methods],
            modalities=[shares.of_method(first, modality) for modality in encoder.modalities],
            cells=sum(len(run.cells) for family in families for run in family.runs),
            versions=_versions(families),
            table=list(_table(families, first, encoder.checks)),
        )
    )


def _table(
    families: Iterable[MatrixFamily], method: str, checks: Sequence[str]
) -> Iterator[tuple[str, list[str | None]]]:
    """Yield each family that was tried with the method, and its verdicts."""
    for family in families:
        for run in family.runs:
            if run.method == method:
                found = {cell.check: cell.verdict for cell in run.cells}
                yield family.model_type, [found.get(check) for check in checks]


def _versions(families: Iterable[MatrixFamily]) -> dict[str, list[str]]:
    """Return distribution -> every version that some cell was made with."""
    found: dict[str, set[str]] = {}
    for versions in {tuple(c.versions.items()) for f in families for r in f.runs for c in r.cells}:
        for name, version in versions:
            found.setdefault(name, set()).add(version)
    return {name: sorted(found[name]) for name in sorted(found)}


def _packed(data: Mapping[str, Any]) -> str:
    """Return JSON as base64 of its deflated bytes: a tenth as long, and no text in it can end its element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def data_of(page: str) -> tuple[str, dict[str, Any]]:
    """Return a page without its data, and the data: pages are the same where both are, however zlib packed them.

    Raises:
        ValueError: it is not such a page.
    """
    found = _DATA.search(page)
    if found is None:
        raise ValueError("the page holds no data of a matrix")
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(found.group(1))))
    return page[: found.start()] + page[found.end() :], data


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> str:
    """Return a file beside the templates as it is."""
    return (Path(__file__).with_name("templates") / name).read_text(encoding="utf-8")
