"""The rules, found by listing this folder: one file a rule, grouped by area."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from graftkit.checks.rule import Rule


@cache
def areas() -> tuple[str, ...]:
    """The folders of rules, by name."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, by code.

    Raises:
        RuntimeError: two files claim one code (an error in the files).
    """
    return _by_code([rule for area in areas() for rule in rules_of(area)])


@cache
def rules_of(area: str) -> tuple[Rule, ...]:
    """The rules of one area, by code.

    Raises:
        RuntimeError: two files claim one code (an error in the files).
    """
    package = importlib.import_module(f"{__name__}.{area}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    rules = [importlib.import_module(f"{package.__name__}.{name}").RULE for name in names]
    return _by_code(rules)


def _by_code(rules: list[Rule]) -> tuple[Rule, ...]:
    by_code: dict[str, Rule] = {}
    for rule in rules:
        if by_code.setdefault(rule.code, rule) is not rule:
            raise RuntimeError(f"two rules claim {rule.code}: {by_code[rule.code].title!r} and {rule.title!r}")
    return tuple(sorted(rules, key=lambda rule: rule.code))
