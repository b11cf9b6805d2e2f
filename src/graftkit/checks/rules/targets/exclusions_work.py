"""Entries of exclude_modules must exclude what they name: PEFT compares them with the end of a path.

## Why it matters

An entry of a list excludes a module whose path ends with it, and nothing inside that module: naming a tower
excludes none of its layers.

## Example

`exclude_modules: ["vision_tower", "audio_tower"]` with "all-linear": both towers are adapted.

## How safe that is

The fix excludes what the entries name and everything inside it; those layers are then not trained.

## Sources

- peft: tuners.tuners_utils.check_target_module_exists
- trl: examples/scripts/carla_vlm_gemma.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.checks.peft_config.fixes import config_fix, recipe_key
from graftkit.findings import Severity, Source
from graftkit.planning.matching import suffix_finder
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    entries = resolved.given.get("exclude_modules")
    if not entries:
        return passed("exclude_modules is empty")
    excluded = len(resolved.before_exclusion) - len(resolved.modules)
    if isinstance(entries, str):
        if excluded:
            return passed(f"{excluded} targets are excluded", excluded=excluded)
        return info("the regular expression excludes none of the targets", where="exclude_modules")
    idle = _idle(entries, resolved.before_exclusion)
    inside = {entry: _inside(entry, resolved.modules) for entry in idle}
    broken = {entry: paths for entry, paths in inside.items() if paths}
    if broken:
        named = ", ".join(f"{entry} ({len(paths)})" for entry, paths in broken.items())
        return failed(
            f"{len(broken)} entries exclude nothing, and the targets inside them are adapted: {named}",
            where=next(iter(broken)),
            help="use a regular expression, which PEFT matches with the whole path",
            fix=config_fix(context, {"exclude_modules": _as_regex(entries, broken)}),
            key=recipe_key(context, "exclude_modules"),
            adapted=sum(map(len, broken.values())),
            excluded=excluded,
        )
    if idle:
        return info(f"{some(idle)} exclude none of the targets", where=idle[0], excluded=excluded)
    return passed(f"{excluded} targets are excluded", excluded=excluded)


def _idle(entries: Iterable[str], targets: Iterable[str]) -> list[str]:
    near = suffix_finder(tuple(entries))
    used = {entry for path in targets for entry in near(path)}
    return [entry for entry in entries if entry not in used]


def _inside(entry: str, modules: Iterable[str]) -> list[str]:
    """Return the targets inside a module of this name."""
    return [path for path in modules if f".{entry}." in f".{path}"]


def _as_regex(entries: Iterable[str], containers: Iterable[str]) -> str:
    """Return an expression for everything inside the containers, and what ends with the other entries."""
    inside: list[str] = []
    at_end: list[str] = []
    for entry in entries:
        (inside if entry in set(containers) else at_end).append(re.escape(entry))
    parts = [rf"{_any(inside)}\..*", *([_any(at_end)] if at_end else [])]
    return rf"(?:.*\.)?{_any(parts)}"


def _any(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


RULE = Rule(
    code="GK111",
    title="every entry of exclude_modules excludes what lies inside it",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help='write it as a regular expression, such as ".*vision_tower.*"',
    since="0.1.0",
    source=Source.INTROSPECTION,
)
