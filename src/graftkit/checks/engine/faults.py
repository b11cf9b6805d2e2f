"""Several faults that one rule found, in one observation: each with its line and its cure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from graftkit.checks.engine.rule import Observation, failed
from graftkit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        code: a stable name for it.
        key: the recipe's dotted key that decides it, or None.
        help: the next step.
    """

    code: str
    message: str
    help: str
    key: str | None = None


def failed_with(faults: Sequence[Fault], recipe: Recipe) -> Observation:
    """Return the observation of these faults, of which there is at least one."""
    if len(faults) == 1:
        message, advice = faults[0].message, faults[0].help
    else:
        message = "; ".join(_with_line(fault, recipe) for fault in faults)
        advice = "; ".join(dict.fromkeys(fault.help for fault in faults))
    key = next((fault.key for fault in faults if fault.key), None)
    return failed(message, help=advice, key=key, faults=[_evidence(fault, recipe) for fault in faults])


def _line(fault: Fault, recipe: Recipe) -> int | None:
    return None if fault.key is None else recipe.line(fault.key)


def _with_line(fault: Fault, recipe: Recipe) -> str:
    line = _line(fault, recipe)
    return fault.message if line is None else f"line {line}: {fault.message}"


def _evidence(fault: Fault, recipe: Recipe) -> dict[str, str | int | None]:
    return {**asdict(fault), "line": _line(fault, recipe)}
