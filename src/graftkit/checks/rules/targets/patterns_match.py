"""Every key of rank_pattern and alpha_pattern must match an adapted layer.

## Why it matters

PEFT uses the default rank and alpha where no key matches, with a warning at most.

## Example

`rank_pattern: {"q_proj": 4}` where the adapted layers are called `q_proj.linear`: rank 8 is used.

## How safe that is

The fix keeps every value and writes keys that match the intended layers alone.

## Sources

- peft: utils.other.get_pattern_key
- peft: tuners.tuners_utils.BaseTuner.inject_adapter
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import config_fix, recipe_key
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.errors import PlanError
from graftkit.findings import Severity, Source
from graftkit.planning.selection.patterns import rekey
from graftkit.text import some

_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    idle = {name: [k for k, paths in resolved.matched_by(name).items() if not paths] for name in _PATTERNS}
    wrong = {name: keys for name, keys in idle.items() if keys}
    if not wrong:
        count = sum(len(resolved.given.get(name) or ()) for name in _PATTERNS)
        return passed(f"each of the {count} keys matches an adapted layer" if count else "there are no patterns")
    name, keys = next(iter(wrong.items()))
    used = resolved.fields.get(_PATTERNS[name])
    rekeyed = {n: _rekeyed(resolved, n, k) for n, k in wrong.items()}
    return failed(
        f"{len(keys)} keys of {name} match no adapted layer: {some(keys)}; {_PATTERNS[name]}={used} is used there",
        where=keys[0],
        fix=config_fix(context, rekeyed) if all(rekeyed.values()) else None,
        key=recipe_key(context, name),
        unmatched=sum(map(len, wrong.values())),
    )


def _rekeyed(resolved: ResolvedTargets, name: str, idle: list[str]) -> dict[str, Any] | None:
    """Return the pattern with keys that match the meant layers; None where a key means no adapted layer."""
    pattern: Mapping[str, Any] = resolved.given[name]
    keyed: dict[str, Any] = {}
    for key, value in pattern.items():
        if key not in idle:
            keyed[key] = value
            continue
        try:
            keyed |= rekey(name, {key: value}, resolved.base, resolved.sites)
        except PlanError:
            return None
    return keyed


RULE = Rule(
    code="GK114",
    title="every key of rank_pattern and alpha_pattern matches an adapted layer",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="write the key as the end of the adapted layer's path",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
