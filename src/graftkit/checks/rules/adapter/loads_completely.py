"""Check that the base takes every tensor, and that the file has tensors for every layer that is targeted.

## Why it matters

PEFT loads what fits and at most warns about the rest: a part of the training is lost unnoticed.

## Example

A mixture-of-experts adapter that was trained with transformers 4 names every expert's `gate_proj`; with
transformers 5 the experts are one stacked parameter, and only attention and shared experts are loaded.

## How safe that is

Renaming tensors changes no value. `graft convert` and `gk.migrate` refuse an adapter that has tensors left over.

## Sources

- peft: utils.save_and_load.set_peft_model_state_dict
- peft: utils.transformers_weight_conversion
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity
from graftkit.text import percent, some


def _check(context: CheckContext) -> Observation:
    if context.saved.prefix is None:
        return unknown(f"adapters of type {some([context.adapter.peft_type])} have no tensors in a model's layers")
    lost, total = context.fit.lost, len(context.adapter.tensors)
    lacking = _lacking(context)
    figures: dict[str, Any] = {"tensors": total, "lost": len(lost), "lacking": len(lacking)}
    if lost:
        share = _share(context, lost)
        figures["lost_square_share"] = share
        first = next(iter(lost))
        weight = "" if share is None else f", {percent(share)} of the squared norm"
        message = f"{len(lost)} of {total} tensors are not loaded{weight}: {some([first])}: {lost[first]}"
        return failed(message, where=first, **figures)
    if lacking:
        message = f"the targets name {len(lacking)} layers that the file has no tensors for: {some(lacking)}"
        advice = "they stay as the base has them: save again on the process that holds every layer"
        return failed(message, where=lacking[0], help=advice, **figures)
    return passed(f"the base takes all {total} tensors, and every targeted layer has its own", **figures)


def _lacking(context: CheckContext) -> list[str]:
    """Return the sites that the targets reach and no tensor belongs to."""
    if context.saved.targets is None:
        return []
    sites = context.fit.sites
    present = {sites[core].path for core in context.saved.modules if core in sites}
    return [path for path in context.fit.planned if path not in present]


def _share(context: CheckContext, lost: Iterable[str]) -> float | None:
    """Return the lost share of the file's squared norm, 0 to 1; None where the data is not read or not finite."""
    if context.given.data is None:
        return None
    stats = context.data.stats
    total = sum(stat.square for stat in stats.values())
    finite = total > 0 and all(stat.finite for stat in stats.values())
    return sum(stats[name].square for name in lost) / total if finite else None


RULE = Rule(
    code="GK501",
    title="the base takes every tensor of the adapter",
    severity=Severity.ERROR,
    needs=("adapter", "base"),
    check=_check,
    help="give the base that the adapter was trained on; where another tool made it, graft convert ADAPTER OUT "
    "--to peft --base BASE gives its tensors PEFT's names, and gk.migrate(adapter, base, out) those of wrappers",
    since="0.1.0",
)
