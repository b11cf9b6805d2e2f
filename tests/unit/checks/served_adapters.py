"""Adapters of many kinds on twins, saved once, and what the rules on serving say of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from tests.unit.checks.observed import by_code
from torch import nn

import graftkit as gk
from graftkit.checks.check import check
from graftkit.engines import Stance

RULES = ("GK701", "GK702", "GK703", "GK704", "GK705")
_ALARMS = frozenset({gk.Severity.ERROR, gk.Severity.WARNING})


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one adapter in one engine.

    Attributes:
        passed: whether all passed: no alarm, and nothing unknown.
        stances: what the engine is said to do with what it does not take.
    """

    passed: bool
    stances: frozenset[Stance]


@dataclass(frozen=True)
class SavedAdapters:
    """Adapters as stock PEFT saves them, each written once for all engines.

    Attributes:
        folder: makes a fresh folder from a name.
    """

    folder: Callable[[str], Path]
    _bases: dict[str, tuple[nn.Module, gk.ModelMap]] = field(default_factory=dict)
    _folders: dict[tuple[str, str], Path] = field(default_factory=dict)

    def verdict(self, engine: str, model: str, name: str, kind: Any) -> Verdict:
        """Judge an adapter.

        Args:
            engine: as ``--target`` takes it.
            model: as ``gk.twin`` takes it.
            name: of the kind.
            kind: its ``targets``, ``scope``, ``method`` and ``options`` are those of ``gk.plan``.
        """
        if model not in self._bases:
            twin = gk.twin(model)
            self._bases[model] = twin, gk.survey(twin)
        twin, base = self._bases[model]
        if (model, name) not in self._folders:
            self._folders[model, name] = _save(twin, base, kind, self.folder(name))
        report = by_code(check(self._folders[model, name], base, target=engine, data=False))
        return _verdict({code: report[code] for code in RULES})


def _verdict(found: Mapping[str, gk.Finding]) -> Verdict:
    stances = {Stance(s) for f in found.values() if f.severity in _ALARMS for s in f.evidence["stances"]}
    return Verdict({f.severity for f in found.values()} == {gk.Severity.OK}, frozenset(stances))


def _save(twin: nn.Module, base: gk.ModelMap, kind: Any, folder: Path) -> Path:
    rank = {"r": 4, "alpha": 4} if kind.method == "loha" else {"r": 4}
    plan = gk.plan(
        base, targets=list(kind.targets), scope=list(kind.scope), method=kind.method, **rank, **kind.options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(twin), plan.peft_config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
