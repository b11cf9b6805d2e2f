"""The user's request, checked before any site is looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graftkit.errors import PlanError
from graftkit.planning.selection.target_names import ALL_LINEAR, ROLE_TARGETS
from graftkit.surveying.sites import ModelMap
from graftkit.text import suggest


@dataclass(frozen=True)
class Intent:
    """The targets as the user wrote them, and the towers to adapt."""

    targets: tuple[str, ...]
    scope: tuple[str, ...]


def read_intent(model_map: ModelMap, targets: str | Iterable[str], scope: str | Iterable[str] | None) -> Intent:
    """Check targets and scope against the model.

    Without a scope, the towers that every batch feeds are meant: the language tower, and the tower of the
    main input where that is not text (a speech recogniser's encoder). Towers that a text-only batch leaves
    unfed have to be asked for.

    Raises:
        PlanError: ``targets-empty`` or ``scope-missing``.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted or not all(isinstance(t, str) and t.strip() for t in wanted):
        raise PlanError(
            "no targets were given",
            help=f"targets={ALL_LINEAR!r}, a list of names, or roles: {', '.join(ROLE_TARGETS)}",
            code="targets-empty",
        )
    present = tuple(tower.name for tower in model_map.towers)
    if scope is None:
        return Intent(wanted, fed_towers(model_map, present))
    named = (scope,) if isinstance(scope, str) else tuple(scope)
    if named == ("all",):
        return Intent(wanted, present)
    for name in named:
        if name not in present:
            raise _no_such_tower(name, present, model_map.model.name)
    return Intent(wanted, named)


def fed_towers(model_map: ModelMap, present: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the ``present`` towers that every batch feeds."""
    fed = [t for t in present if t == "language" or t in model_map.model.fed_towers]
    # The head is in reach by name; "all-linear" leaves it out whatever the scope.
    return (
        *(fed or [t for t in present if t not in {"head", "projector"}]),
        *(t for t in present if t == "head"),
    )


def _no_such_tower(name: str, present: tuple[str, ...], model: str) -> PlanError:
    return PlanError(
        f"this model has no {name!r} tower",
        where=model,
        why=f"its towers are {', '.join(present)}",
        help=suggest(name, present) or f"scope={list(present)}, or leave scope out",
        code="scope-missing",
    )
