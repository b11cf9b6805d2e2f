"""What the rules on serving say, held against what real engines did: no false alarm, none missed, none unknown."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.unit.checks.served_adapters import SavedAdapters

from graftkit.engines import Stance

_TABLE = tomllib.loads(Path(__file__).parents[1].joinpath("served_cells.toml").read_text(encoding="utf-8"))
_FAMILIES: Mapping[str, str] = _TABLE.pop("families")


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: the arguments of ``gk.plan``."""

    targets: tuple[str, ...] = ("attention",)
    scope: tuple[str, ...] = ("language",)
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)


_KINDS = {
    "experts": Kind(("experts",)),
    "router": Kind(("router",)),
    "head": Kind(("head",), ("head",)),
    "latent": Kind(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")),
    "latent-values": Kind(("kv_b_proj",)),
    "tower": Kind(("all-linear",), ("vision",)),
    "bias": Kind(options={"bias": "all"}),
}


def _cells() -> Iterator[Any]:
    for engine, kinds in _TABLE.items():
        for kind, outcomes in kinds.items():
            for outcome, families in outcomes.items():
                for family in families:
                    yield pytest.param(engine, kind, family, outcome, id=f"{engine}: {kind} of {family}")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> SavedAdapters:
    return SavedAdapters(tmp_path_factory.mktemp)


@pytest.mark.parametrize(("engine", "kind", "family", "outcome"), list(_cells()))
def test_the_rules_say_what_the_engine_did(
    adapters: SavedAdapters, engine: str, kind: str, family: str, outcome: str
) -> None:
    verdict = adapters.verdict(engine, _FAMILIES[family], kind, _KINDS[kind])
    if outcome == "equal":
        assert verdict.passed, verdict
    elif kind == "tower":
        # What happens depends on how the server is started.
        assert verdict.stances
    elif outcome == "silent":
        assert verdict.stances == {Stance.IGNORES}
    else:
        # A refusal comes before anything it would ignore.
        assert Stance.REFUSES in verdict.stances
