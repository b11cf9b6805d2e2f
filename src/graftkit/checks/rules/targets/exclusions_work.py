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

from collections.abc import Iterable

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.checks.peft_config.fixes import config_fix, recipe_key
from graftkit.findings import Severity, Source
from graftkit.planning.matching import suffix_finder, whole_modules
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
    broken = resolved.not_excluded
    if broken:
        named = ", ".join(f"{entry} ({len(paths)})" for entry, paths in broken.items())
        return failed(
            f"{len(broken)} entries do not exclude the targets inside the modules they name: {named}",
            where=next(iter(broken)),
            help="use a regular expression, which PEFT matches with the whole path",
            fix=config_fix(context, {"exclude_modules": whole_modules(entries)}),
            key=recipe_key(context, "exclude_modules"),
            adapted=sum(map(len, broken.values())),
            excluded=excluded,
        )
    idle = _idle(entries, resolved.before_exclusion)
    if idle:
        return info(f"{some(idle)} exclude none of the targets", where=idle[0], excluded=excluded)
    return passed(f"{excluded} targets are excluded", excluded=excluded)


def _idle(entries: Iterable[str], targets: Iterable[str]) -> list[str]:
    near = suffix_finder(tuple(entries))
    used = {entry for path in targets for entry in near(path)}
    return [entry for entry in entries if entry not in used]


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
