"""Fixes for a stock PEFT configuration, wherever it is written down: a recipe, or a saved adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.findings import Fix
from graftkit.planning.matching import rewritten_names, smallest_exact

_SECTION = "adapter.peft_config"


def recipe_key(context: CheckContext, field: str) -> str | None:
    """The recipe's key that decides a field of the configuration; None where no recipe does."""
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
    """A fix of fields of the stock configuration, or None where that is written in no file that may be changed.

    Args:
        sets: field -> value.
        removes: fields to drop.
        saved: whether it is right for an adapter that has been trained already, too.
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


def retargeted(
    context: CheckContext, resolved: ResolvedTargets, modules: Iterable[str], *, saved: bool = False
) -> Fix | None:
    """A fix that makes ``target_modules`` name exactly these modules, and the experts it names now."""
    paths = set(modules)
    planned = [path for path in resolved.base.module_paths if path in paths]
    rewrites = bool(resolved.is_lora and rewritten_names(resolved.base.model.model_type))
    # Where PEFT makes experts of names, a string names experts too, and cannot be put as a list.
    if not planned or (rewrites and isinstance(resolved.targets, str)):
        return None
    targets = smallest_exact(planned, resolved.base.module_paths, regex_is_safe=not rewrites)
    if resolved.rewritten:
        targets = sorted({*targets, *resolved.rewritten})
    # The paths are of the chosen layers already, and PEFT takes no layers beside a regular expression.
    chosen = [n for n in ("layers_to_transform", "layers_pattern") if resolved.given.get(n) is not None]
    return config_fix(context, {"target_modules": targets}, chosen, saved=saved)


def more_parameters(context: CheckContext, resolved: ResolvedTargets, parameters: Iterable[str]) -> Fix | None:
    """A fix that adds parameters to ``target_parameters``, by the shortest names that are exact."""
    given = resolved.given.get("target_parameters") or []
    short = smallest_exact(list(parameters), resolved.base.parameter_paths, regex_is_safe=False)
    return config_fix(context, {"target_parameters": sorted({*given, *short})})
