"""The table of what engines made of adapters: run, read, written, and compared."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tests.serve.cells import (
    FAMILIES,
    FLAGGED,
    MERGED_KINDS,
    R,
    kinds_of,
    log_probabilities,
    prefixes,
    save_adapter,
)

import graftkit as gk
from graftkit.engines.outcome import Outcome
from graftkit.serving.engine_process import Answer, EngineRun, Job, serve
from graftkit.serving.engine_twin import write_engine_twin
from graftkit.serving.install import engine_python
from graftkit.serving.outcomes import Measured, served

TABLE = Path(__file__).with_name("expected.toml")
ENGINES = ("vllm", "llama.cpp", "mlx")
# Where this is set, the table is written instead of being compared.
WRITE = "GRAFTKIT_WRITE_SERVE_TABLE"
FORMS = STOCK, FLAG, CONVERTED, MERGED = "stock", "flag", "converted", "merged"
# In nats: llama.cpp's on Gemma 4 is a few thousandths in float32; adapters' effects are above 0.5.
_LARGEST_BASE_ERROR = 0.02
# Converted adapters have more rows than those they were made of: experts side by side, doubled ranks.
_MAX_RANK = 8 * R
_HEADER = """\
# What each engine makes of each kind of adapter (tests/serve/cells.py): as PEFT saves it ("stock"), and after
# `graft convert` ("converted"; "convert-…" is the code of a conversion that is refused: merge instead),
# and for some what it makes of the checkpoint that `graft merge` writes ("merged"), or of the stock adapter with
# options of the server ("flag").
# A test runs the engines and compares; `make serve-table` writes this file.
"""


@dataclass(frozen=True)
class Row:
    """What an engine made of one family.

    Attributes:
        version: the engine's.
        base: what became of the base without any adapter: "equal", "different" or "refused".
        cells: kind -> form ("stock", "flag", "converted", "merged") -> outcome.
        notes: (kind, form) -> its figures, or the words of a refusal.
    """

    version: str
    base: str
    cells: Mapping[str, Mapping[str, str]]
    notes: Mapping[tuple[str, str], str] = field(default_factory=dict)


def expected() -> dict[str, dict[str, Row]]:
    """Return the checked-in table: engine -> family -> row."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    return {
        engine: {f: _row(rows["version"], rows[f]) for f in FAMILIES if f in rows}
        for engine, rows in table.items()
    }


def _row(version: str, entry: Mapping[str, Any]) -> Row:
    return Row(version, entry["base"], {kind: cell for kind, cell in entry.items() if kind != "base"})


def run_family(engine: str, family: str, folder: Path) -> Row:
    """Serve every adapter of a family, as it is, converted and merged, in one engine.

    Raises:
        EngineError: ``engine-missing``, or the engine did not answer.
    """
    python = engine_python(engine)
    base = write_engine_twin(FAMILIES[family], folder / "base")
    write_engine_twin(FAMILIES[family], folder / "served", engine=engine)
    before = log_probabilities(base, prefixes())
    after = {kind.name: save_adapter(base, kind, folder / kind.name) for kind in kinds_of(family)}
    adapters = {(name, STOCK): folder / name for name in after}
    refused = _convert(engine, adapters, folder)
    job = Job(folder / "served", {"/".join(cell): path for cell, path in adapters.items()}, prefixes(), _MAX_RANK)
    run = serve(engine, python, job)
    version = run.engine.removeprefix(f"{engine} ")
    if run.base.values is None:
        return Row(version, "refused", {}, {("base", STOCK): str(run.base.refusal)})
    answers = {_cell(name): answer for name, answer in run.adapters.items()}
    answers |= _merged(engine, python, family, folder)
    answers |= _flagged(engine, python, family, folder)
    return Judge(run, before, after).row(version, answers, refused)


def _merged(engine: str, python: Path, family: str, folder: Path) -> dict[tuple[str, str], Answer]:
    answers = {}
    for kind in MERGED_KINDS.get(family, ()):
        gk.merge(folder / "base", folder / kind, folder / f"{kind}-merged")
        job = Job(folder / f"{kind}-merged", {}, prefixes())
        answers[kind, MERGED] = serve(engine, python, job).base
    return answers


def _flagged(engine: str, python: Path, family: str, folder: Path) -> dict[tuple[str, str], Answer]:
    answers = {}
    for kind in (kind.name for kind in kinds_of(family)):
        if flags := FLAGGED.get((engine, family, kind)):
            served_with = {"options": flags.options, "requests": {kind: flags.request}}
            job = Job(folder / "served", {kind: folder / kind}, prefixes(), _MAX_RANK, **served_with)
            answers[kind, FLAG] = serve(engine, python, job).adapters[kind]
    return answers


def _cell(name: str) -> tuple[str, str]:
    kind, _, form = name.partition("/")
    return kind, form


def _convert(engine: str, adapters: dict[tuple[str, str], Path], folder: Path) -> dict[tuple[str, str], str]:
    """Convert each adapter and add it to ``adapters``; return the codes of the conversions that are refused."""
    refused = {}
    for (name, _), path in list(adapters.items()):
        cell = (name, CONVERTED)
        try:
            gk.convert(path, folder / f"{name}-converted", to=engine, base=folder / "base")
        except gk.GraftError as error:
            refused[cell] = error.code
        else:
            adapters[cell] = folder / f"{name}-converted"
    return refused


@dataclass(frozen=True)
class Judge:
    """Compares what one engine served of one family with what was expected.

    Attributes:
        run: its answer for the base, and who it was.
        before: log-probabilities of the base in transformers, (prefixes, vocabulary).
        after: kind -> the same with its adapter.
    """

    run: EngineRun
    before: Any
    after: Mapping[str, Any]

    def row(
        self, version: str, answers: Mapping[tuple[str, str], Answer], refused: Mapping[tuple[str, str], str]
    ) -> Row:
        """Return what became of every cell: those that were served, and those whose conversion was refused."""
        judged = {cell: self.outcome(cell[0], answer) for cell, answer in answers.items()}
        outcomes = {**{cell: outcome for cell, (outcome, _) in judged.items()}, **refused}
        error = float(np.abs(self._of_vocabulary(self.run.base) - self.before).max())
        return Row(
            version=version,
            base="equal" if error < _LARGEST_BASE_ERROR else "different",
            cells={
                kind: {form: outcomes[kind, form] for form in FORMS if (kind, form) in outcomes}
                for kind in self.after
            },
            notes={cell: note for cell, (_, note) in judged.items()},
        )

    def outcome(self, kind: str, answer: Answer) -> tuple[str, str]:
        """Return the outcome of one answer, and its figures or the words of a refusal."""
        if answer.values is None:
            return str(Outcome.REFUSED), str(answer.refusal)
        columns = (self.before, self.after[kind], self._of_vocabulary(self.run.base), self._of_vocabulary(answer))
        found = served(Measured(*(values.ravel().tolist() for values in columns)), self.run.engine)
        note = f"effect {found.effect:.3g}, error {found.error:.3g}, the base's {found.base_error:.3g}"
        return str(found.outcome), note if found.factor is None else f"{note}, factor {found.factor:.3g}"

    def _of_vocabulary(self, answer: Answer) -> Any:
        """Return the columns of the vocabulary, which an engine may pad."""
        assert answer.values is not None
        return answer.values[:, : self.before.shape[1]]


def differences(engine: str, family: str, found: Row) -> list[str]:
    """Return a line for each cell that is not what the table says."""
    row = expected().get(engine, {}).get(family) or Row("none", "not there", {})
    versions = found.version if found.version == row.version else f"{found.version}, the table {row.version}"
    place = f"{engine} ({versions}) {family}"
    lines = [f"{place}: the base is {found.base}, expected {row.base}"] if found.base != row.base else []
    for kind, form in _keys(found, row):
        was, now = row.cells.get(kind, {}).get(form), found.cells.get(kind, {}).get(form)
        if was != now:
            note = found.notes.get((kind, form), "").partition("\n")[0]
            lines.append(f"{place} {kind}, {form}: {now}, expected {was}" + (f" [{note}]" if note else ""))
    return lines


def _keys(*rows: Row) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys((kind, form) for row in rows for kind, cell in row.cells.items() for form in cell)


def writes() -> bool:
    """Check whether the table is to be written."""
    return bool(os.environ.get(WRITE))


def write(engine: str, family: str, found: Row) -> None:
    """Replace one row of the table. Several processes may write at once."""
    with FileLock(f"{TABLE}.lock"):
        table = expected()
        table.setdefault(engine, {})[family] = found
        TABLE.write_text(_text(table), encoding="utf-8")


def _text(table: Mapping[str, Mapping[str, Row]]) -> str:
    lines = [_HEADER.rstrip()]
    for engine in ENGINES:
        rows = {family: table[engine][family] for family in FAMILIES if family in table.get(engine, {})}
        if not rows:
            continue
        lines += ["", f'["{engine}"]', f'version = "{next(reversed(rows.values())).version}"']
        for family, row in rows.items():
            lines += ["", f'["{engine}".{family}]', f'base = "{row.base}"']
            for kind, cell in row.cells.items():
                fields = ", ".join(f'{form} = "{outcome}"' for form, outcome in cell.items())
                lines.append(f"{kind} = {{ {fields} }}")
    return "\n".join(lines) + "\n"
