"""Check that the bounds in memory are those of the checkpoint.

## Why it matters

Bounds are buffers, and losing them raises no error: infinite bounds clamp nothing, uninitialized ones clamp
everything. The adapter is then trained on a different base than the one that is served.

## Example

A model is built on the meta device and moved with `to_empty()`: its bounds are uninitialized memory. A
checkpoint was saved without the wrappers: its bounds are infinite.

## How safe that is

Reloading changes only the bounds. An adapter that was trained without them has to be trained again.

## Sources

- safetensors: the scalars of the checkpoint
- torch: nn.Module.to_empty
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, info, passed
from graftkit.findings import Severity
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.surveying.checkpoint.scalars import read_scalars

if TYPE_CHECKING:
    from torch import nn


def _check(context: CheckContext) -> Observation:
    base: nn.Module = context.model.get_base_model()
    loaded = {
        f"{bounded.path}.{name}": float(value)
        for bounded in bounded_wrappers(base)
        for name, value in bounded.bounds.items()
    }
    if not loaded:
        return passed("the model has no bounds around its linears")
    stored = read_scalars(base, context.checkpoint, loaded)
    bounds = [_Bound(name, value, stored.get(name)) for name, value in loaded.items()]
    rounding = RULE.limit(context.settings, "rounding")
    found = {name: [bound for bound in bounds if is_wrong(bound, rounding)] for name, is_wrong in _FAULTS.items()}
    evidence: dict[str, Any] = {"bounds": len(bounds), **{name: len(of) for name, of in found.items()}}
    for name, of in found.items():
        if of:
            message = f"{len(of)} of {len(bounds)} bounds are {name}: {of[0].loaded:g} in memory, {of[0].in_file}"
            return failed(message, where=of[0].name, **evidence)
    worst = max(bounds, key=lambda bound: bound.error)
    evidence["worst_relative_error"] = worst.error
    if worst.error > 0:
        rounded = sum(bound.error > 0 for bound in bounds)
        message = f"{rounded} of {len(bounds)} bounds are rounded, by up to {100 * worst.error:.2f} %"
        return info(
            message, where=worst.name, help="load in float32 to clamp exactly where the base does", **evidence
        )
    return passed(f"all {len(bounds)} bounds are the checkpoint's", **evidence)


@dataclass(frozen=True)
class _Bound:
    """One bound: its name, and its value in memory and in the file (None where the file has none)."""

    name: str
    loaded: float
    stored: float | None

    @property
    def in_file(self) -> str:
        """The stored value as a message has it."""
        return "none in the file" if self.stored is None else f"{self.stored:g} in the file"

    @property
    def is_lost(self) -> bool:
        """Whether the file has a finite value and memory has none."""
        return self.stored is not None and math.isfinite(self.stored) and not math.isfinite(self.loaded)

    @property
    def error(self) -> float:
        """The difference relative to the stored value; infinite where one of the two is not finite."""
        if self.stored is None or self.stored == self.loaded:
            return 0.0
        if not (math.isfinite(self.stored) and math.isfinite(self.loaded)):
            return math.inf
        return abs(self.loaded - self.stored) / max(abs(self.stored), 1e-12)


# What can be wrong with a bound; the names follow "bounds are". The number is the accepted rounding.
_FAULTS: Mapping[str, Callable[[_Bound, float], bool]] = {
    "missing from the checkpoint": lambda bound, _: bound.stored is None,
    "lost": lambda bound, _: bound.is_lost,
    "not the checkpoint's": lambda bound, rounding: bound.error > rounding,
}


RULE = Rule(
    code="GK305",
    title="the bounds around linears are those of the checkpoint",
    severity=Severity.ERROR,
    needs=("model", "checkpoint"),
    check=_check,
    help="load the model with from_pretrained from a checkpoint that has its bounds",
    since="0.1.0",
    settings={
        "rounding": Setting(2.0**-8, "largest relative difference that counts as rounding, as bfloat16's"),
    },
)
