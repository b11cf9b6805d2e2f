"""Fixes for a stock PEFT configuration, in a recipe or in a saved adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.findings import Fix
from graftkit.planning.config.options import not_on_parameters
from graftkit.planning.matching import smallest_exact

_SECTION = "adapter.peft_config"


def recipe_key(context: CheckContext, field: str) -> str | None:
    """Return the recipe's key that decides a field of the configuration; None where no recipe does."""
    if context.given.recipe is None or context.given.folder is not None:
        return None
    return f"{_SECTION}.{field}" if context.recipe.fields.adapter.peft_config is not None else "adapter"


def config_fix(
    context: CheckContext,
    sets: Mapping[str, Any] | None = None,
    removes: Iterable[str] = (),
    *,
    saved: bool = False,
) -> Fix | None:
    """Return a fix that sets and removes fields, or None where no file that may be changed has them.

    Args:
        context: where the configuration comes from.
        sets: field -> value.
        removes: fields to drop.
        saved: whether the fix is also right for an adapter that is already trained.
    """
    sets = sets or {}
    if context.given.folder is not None:
        return Fix("adapter", dict(sets), tuple(removes)) if saved else None
    if context.given.recipe is None or context.recipe.fields.adapter.peft_config is None:
        return None
    return Fix(
        "recipe",
        {f"{_SECTION}.{name}": value for name, value in sets.items()},
        tuple(f"{_SECTION}.{name}" for name in removes),
    )


def retargeted(context: CheckContext, modules: Iterable[str], *, saved: bool = False) -> Fix | None:
    """Return a fix that makes ``target_modules`` name exactly these modules, and the experts it names now.

    None while ``exclude_modules`` does not exclude what it means: that is fixed first, and leaves other targets.
    """
    resolved, wanted = context.resolved, set(modules)
    if context.given.folder is None and resolved.not_excluded:
        return None
    planned = [path for path in resolved.base.module_paths if path in wanted]
    rewrites = bool(resolved.expert_names)
    # Where PEFT takes names for experts, a regular expression names experts too, and a list cannot replace it.
    if not planned or (rewrites and isinstance(resolved.targets, str)):
        return None
    targets = smallest_exact(planned, resolved.base.module_paths, regex_is_safe=not rewrites)
    if resolved.rewritten:
        targets = sorted({*targets, *resolved.rewritten})
    # The paths are in the chosen layers already, and PEFT refuses these fields beside a regular expression.
    chosen = [n for n in ("layers_to_transform", "layers_pattern") if resolved.given.get(n) is not None]
    return config_fix(context, {"target_modules": targets}, chosen, saved=saved)


def more_parameters(context: CheckContext, parameters: Iterable[str]) -> Fix | None:
    """Return a fix that adds parameters to ``target_parameters``, by the shortest exact names.

    None where an option of the configuration cannot be used on parameters.
    """
    resolved = context.resolved
    if not_on_parameters(resolved.given):
        return None
    given = resolved.given.get("target_parameters") or []
    short = smallest_exact(list(parameters), resolved.base.parameter_paths, regex_is_safe=False)
    return config_fix(context, {"target_parameters": sorted({*given, *short})})
