"""What the rules on serving say, held against what real engines did: no false alarm, none missed, none unknown."""

from __future__ import annotations

import copy
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, get_peft_model
from tests.unit.checks.observed import by_code
from torch import nn

import graftkit as gk
from graftkit.checks.check import check

_TABLE = tomllib.loads(Path(__file__).parents[1].joinpath("served_cells.toml").read_text(encoding="utf-8"))
_FAMILIES: Mapping[str, str] = _TABLE.pop("families")
_RULES = ("GK701", "GK702", "GK703", "GK704", "GK705")
_SILENT, _REFUSED = frozenset({"ignores"}), frozenset({"refuses"})
# On towers, what happens depends on how the server is started.
_EITHER = _SILENT | _REFUSED


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: the arguments of ``gk.plan``."""

    targets: tuple[str, ...] = ("attention",)
    scope: tuple[str, ...] = ("language",)
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)


_KINDS = {
    "attention": Kind(),
    "all-linear": Kind(("all-linear",)),
    "rslora": Kind(method="rslora"),
    "rank-pattern": Kind(options={"rank_pattern": {"o_proj": 8}}),
    "alpha-pattern": Kind(options={"alpha_pattern": {"o_proj": 8}}),
    "experts": Kind(("experts",)),
    "router": Kind(("router",)),
    "embeddings": Kind(("embed_tokens",)),
    "head": Kind(("head",), ("head",)),
    "per-layer-embeddings": Kind(("embed_tokens_per_layer",)),
    "per-layer-gates": Kind(("per_layer_input_gate", "per_layer_projection")),
    "per-layer-projection": Kind(("per_layer_model_projection",)),
    "latent": Kind(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")),
    "latent-values": Kind(("kv_b_proj",)),
    "tower": Kind(("all-linear",), ("vision",)),
    "dora": Kind(method="dora"),
    "loha": Kind(method="loha"),
    "pissa": Kind(options={"init_lora_weights": "pissa"}),
    "bias": Kind(options={"bias": "all"}),
    "tokens": Kind(options={"trainable_token_indices": [5, 6, 7]}),
    "saved-norm": Kind(options={"modules_to_save": ["input_layernorm"]}),
}


def _cells() -> Iterator[Any]:
    for engine, kinds in _TABLE.items():
        for kind, outcomes in kinds.items():
            for outcome, families in outcomes.items():
                for family in families:
                    yield pytest.param(engine, kind, family, outcome, id=f"{engine}: {kind} of {family}")


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, gk.ModelMap]]:
    """Return a function that saves an adapter as PEFT does, once for all engines, with the map of its base."""
    folders: dict[tuple[str, str], Path] = {}
    bases: dict[str, tuple[nn.Module, gk.ModelMap]] = {}

    def make(family: str, kind: str) -> tuple[Path, gk.ModelMap]:
        if family not in bases:
            twin = gk.twin(_FAMILIES[family])
            bases[family] = twin, gk.survey(twin)
        if (family, kind) not in folders:
            folders[family, kind] = tmp_path_factory.mktemp(kind)
            _save(*bases[family], _KINDS[kind], folders[family, kind])
        return folders[family, kind], bases[family][1]

    return make


def _save(twin: nn.Module, base: gk.ModelMap, kind: Kind, folder: Path) -> None:
    rank = {"r": 4, "alpha": 4} if kind.method == "loha" else {"r": 4}
    plan = gk.plan(
        base, targets=list(kind.targets), scope=list(kind.scope), method=kind.method, **rank, **kind.options
    )
    config: PeftConfig = plan.peft_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(twin), config)
    model.save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize(("engine", "kind", "family", "outcome"), list(_cells()))
def test_the_rules_say_what_the_engine_did(
    adapter_of: Callable[[str, str], tuple[Path, gk.ModelMap]], engine: str, kind: str, family: str, outcome: str
) -> None:
    folder, base = adapter_of(family, kind)
    report = by_code(check(folder, base, target=engine, data=False))
    found = {code: report[code] for code in _RULES}
    alarms = [f for f in found.values() if f.severity in {gk.Severity.ERROR, gk.Severity.WARNING}]
    stances = {stance for finding in alarms for stance in finding.evidence["stances"]}
    if outcome == "equal":
        assert {code: f.severity for code, f in found.items()} == dict.fromkeys(_RULES, gk.Severity.OK)
    elif kind == "tower":
        assert stances
        assert stances <= _EITHER
    elif outcome == "silent":
        assert stances == _SILENT
    else:
        # A refusal comes before anything it would ignore.
        assert "refuses" in stances
