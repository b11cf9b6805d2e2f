"""The rules, found by listing this folder: one file a rule, one folder an area."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import given_severity
from graftkit.errors import RecipeError
from graftkit.recipes.settings import CheckSettings
from graftkit.text import suggest


@cache
def all_rules() -> tuple[Rule, ...]:
    """Return every rule, by code.

    Raises:
        RuntimeError: two files have the same code.
    """
    areas = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    return _by_code([rule for area in areas for rule in rules_of(area)])


@cache
def rules_of(area: str) -> tuple[Rule, ...]:
    """Return the rules of one area, by code.

    Raises:
        RuntimeError: two files have the same code.
    """
    package = importlib.import_module(f"{__name__}.{area}")
    files = pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}.")
    return _by_code([importlib.import_module(file.name).RULE for file in files])


def check_settings(settings: CheckSettings) -> None:
    """Check that settings name rules and settings of rules, which would otherwise have no effect.

    Raises:
        RecipeError: ``settings``.
    """
    codes = [rule.code for rule in all_rules()]
    given = (*settings.select, *settings.ignore, *settings.rules)
    wrong = next((n for n in given if not any(c.startswith(n) for c in codes)), None)
    wrong = wrong or next((code for code in settings.rules if code not in codes), None)
    if wrong is not None:
        guess = suggest(wrong, codes)
        raise RecipeError(
            f"no rule's code begins with {wrong!r}",
            where="--select, --ignore, or the settings of a recipe or of pyproject.toml",
            why=f"there are {len(codes)} rules, from {min(codes)} to {max(codes)}",
            help=f"{guess} graft rules lists them" if guess else "graft rules lists them",
            code="settings",
        )
    for rule in all_rules():
        given_severity(rule, settings)


def _by_code(rules: list[Rule]) -> tuple[Rule, ...]:
    by_code: dict[str, Rule] = {}
    for rule in rules:
        other = by_code.setdefault(rule.code, rule)
        if other is not rule:
            raise RuntimeError(f"two rules have the code {rule.code}: {other.title!r} and {rule.title!r}")
    return tuple(sorted(rules, key=lambda rule: rule.code))
