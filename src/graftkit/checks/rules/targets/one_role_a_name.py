"""A target name must not match layers of another kind that have the same name.

## Why it matters

PEFT matches a name anywhere: an MLP's `gate_proj` may also be a part of the attention.

## Example

`gate_proj` on a model whose attention compresses its cache with a linear of that name.

## How safe that is

The layers of the other kind are then no longer trained.

## Sources

- peft: tuners.tuners_utils.check_target_module_exists
"""

from __future__ import annotations

from collections import defaultdict

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.findings import Severity, Source
from graftkit.surveying.roles.by_name import role_of
from graftkit.surveying.sites import Site
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    if context.given.plan is not None:
        return passed("the plan wrote names that match its layers exactly")
    if not isinstance(resolved.targets, tuple):
        return passed("the targets are not a list of names")
    by_path = {site.path: site for site in resolved.sites}
    for name, paths in resolved.named.items():
        foreign = _foreign(name, [by_path[path] for path in paths if path in by_path])
        if foreign:
            parents = sorted({site.path.split(".")[-2] for site in foreign if "." in site.path})
            return failed(
                f"{name} also names {len(foreign)} layers of another kind, in {some(parents)}",
                where=foreign[0].path,
                help=f"name it with its parent, such as {_with_parent(by_path, paths, foreign)}",
                key=recipe_key(context, "target_modules"),
                name=name,
                foreign=len(foreign),
            )
    return passed("each name stands for one kind of layer")


def _foreign(name: str, sites: list[Site]) -> list[Site]:
    """Return sites of a kind that this name does not usually name, in towers that have the usual kind as well."""
    usual = role_of((name.rpartition(".")[2],), "linear").partition(".")[0]
    kinds: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        kinds[site.tower, site.role.partition(".")[0]].append(site)
    towers = {tower for tower, kind in kinds if kind == usual}
    return [s for (tower, kind), found in kinds.items() if tower in towers and kind != usual for s in found]


def _with_parent(by_path: dict[str, Site], paths: tuple[str, ...], foreign: list[Site]) -> str:
    strange = {site.path for site in foreign}
    meant = next(path for path in paths if path in by_path and path not in strange)
    return ".".join(meant.split(".")[-2:])


RULE = Rule(
    code="GK109",
    title="each name stands for one kind of layer",
    severity=Severity.WARNING,
    needs=("peft_config", "base"),
    check=_check,
    help="name the layer with its parent",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
