"""What the rules on serving say, held against the table of what real engines did (`tests/serve`)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.serve import cells
from tests.unit.checks.served_adapters import SavedAdapters

from graftkit.engines import Stance
from graftkit.engines.outcome import Outcome

_TABLE = Path(cells.__file__).with_name("expected.toml")
_ENGINES = {"llama.cpp": "llama_cpp"}
_KINDS = {kind.name: kind for kind in cells.KINDS}
# Prompts of text alone do not show what an engine does with towers.
_UNSEEN = frozenset({"language-and-tower"})


def _cells() -> list[Any]:
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return [
        pytest.param(engine, kind, family, rows[family][kind]["stock"], id=f"{engine}: {kind} of {family}")
        for engine, rows in table.items()
        for family in cells.FAMILIES
        for kind in _KINDS
        if kind in rows.get(family, {}) and kind not in _UNSEEN
    ]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> SavedAdapters:
    return SavedAdapters(tmp_path_factory.mktemp)


@pytest.mark.parametrize(("engine", "kind", "family", "outcome"), _cells())
def test_the_rules_say_what_the_engine_did(
    adapters: SavedAdapters, engine: str, kind: str, family: str, outcome: str
) -> None:
    verdict = adapters.verdict(_ENGINES.get(engine, engine), cells.FAMILIES[family], kind, _KINDS[kind])
    if outcome == Outcome.APPLIED:
        assert verdict.passed, verdict
    elif outcome == Outcome.REFUSED:
        # A refusal comes before anything it would ignore.
        assert Stance.REFUSES in verdict.stances
    else:
        assert verdict.stances == {Stance.IGNORES}
