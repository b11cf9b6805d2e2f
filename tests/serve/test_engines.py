"""Every kind of adapter in every engine: what is served is what the table says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.serve.cells import FAMILIES, FLAGGED, KINDS, MERGED_KINDS, kinds_of
from tests.serve.table import (
    CONVERTED,
    ENGINES,
    FLAG,
    MERGED,
    STOCK,
    TABLE,
    differences,
    expected,
    run_family,
    write,
    writes,
)

from graftkit.engines.outcome import Outcome
from graftkit.errors import EngineError
from graftkit.report.serving_table import Answer, sections

EXPECTED = expected()


@pytest.mark.serve
@pytest.mark.filterwarnings(
    "ignore"
)  # of fourteen architectures and twenty options; what is asserted is the outcome
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_cell_is_what_the_table_says(engine: str, family: str, tmp_path: Path) -> None:
    try:
        found = run_family(engine, family, tmp_path)
    except EngineError as error:
        if error.code != "engine-missing":
            raise
        pytest.skip(str(error))
    if writes():
        write(engine, family, found)
        return
    unexpected = differences(engine, family, found)
    assert not unexpected, "\n".join(unexpected)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_table_has_every_family_and_kind(engine: str) -> None:
    rows = EXPECTED[engine]
    assert set(rows) == set(FAMILIES)
    for family, row in rows.items():
        kinds = [kind.name for kind in kinds_of(family)] if row.base != "refused" else []
        assert list(row.cells) == kinds
        for kind, cell in row.cells.items():
            flag = [FLAG] if (engine, family, kind) in FLAGGED else []
            merged = [MERGED] if kind in MERGED_KINDS.get(family, ()) else []
            assert list(cell) == [STOCK, *flag, CONVERTED, *merged]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_cell_was_decided(engine: str) -> None:
    decided = {str(outcome) for outcome in Outcome} - {str(Outcome.UNKNOWN)}
    for row in EXPECTED[engine].values():
        for cell in row.cells.values():
            refused = cell[CONVERTED].startswith("convert-")
            assert {outcome for form, outcome in cell.items() if form != CONVERTED or not refused} <= decided


def test_what_is_converted_is_applied() -> None:
    """A conversion that is not refused has promised that the engine computes the adapter's update."""
    broken = [
        (engine, family, kind, cell[CONVERTED])
        for engine, rows in EXPECTED.items()
        for family, row in rows.items()
        for kind, cell in row.cells.items()
        if cell[CONVERTED] != Outcome.APPLIED and not cell[CONVERTED].startswith("convert-")
    ]
    assert broken == []


def test_every_merged_checkpoint_is_served_as_it_was_computed() -> None:
    merged = {
        (engine, family, kind): cell[MERGED]
        for engine, rows in EXPECTED.items()
        for family, row in rows.items()
        for kind, cell in row.cells.items()
        if MERGED in cell
    }
    # mlx-lm reads gpt-oss's experts in MXFP4 or from checkpoints of its own (families/gpt_oss.py).
    assert merged.pop(("mlx", "gpt_oss", "experts")) == Outcome.REFUSED
    assert set(merged.values()) == {str(Outcome.APPLIED)}


def test_the_facts_on_engines_say_what_was_measured() -> None:
    """Where both say something of a site, they agree; a flag of the server was not set when it was measured."""
    measured = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    stated, seen = _answers({}), _answers(measured)
    compared = {cell: answer.removesuffix("*") for cell, answer in seen.items() if answer.endswith("*")}
    assert len(compared) > 100
    known = {
        cell: answer for cell, answer in compared.items() if stated[cell] not in (Answer.UNKNOWN, Answer.FLAG)
    }
    assert {cell: stated[cell] for cell in known} == known


def _answers(measured: Any) -> dict[tuple[str, str, str], str]:
    """Return the public table's answer for each architecture, site and engine."""
    section = sections(measured)[0]
    return {
        (row[0], row[1], engine): answer
        for row in section.rows
        for engine, answer in zip(section.columns[2:], row[2:], strict=True)
    }


def test_ten_families_and_every_kind_of_site_are_there() -> None:
    assert len(FAMILIES) >= 10
    assert len({kind.name for kind in KINDS}) == len(KINDS)
