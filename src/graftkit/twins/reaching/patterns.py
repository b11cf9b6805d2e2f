"""Sites of a twin's few layers -> patterns that also say which of a full model's many layers are meant.

A pattern is a site's path with ``*`` for any number, ``0`` for the first of a list, ``-1`` for its last and
``:-1`` for all others: ``layers.*.indexer.wq`` means every layer's, ``encoder.layers.-1.fc1`` the last layer's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import product

_ANY, _FIRST, _LAST, _ALL_BUT_LAST = "*", "0", "-1", ":-1"

# One that is not the last may be meant for being the first.
_SEVERAL = 2


def all_but_last(some: Collection[str], paths: Sequence[str]) -> tuple[str, ...]:
    """Return patterns for those of ``some`` that are all but the last of a list: two or more of one make.

    Args:
        some: the paths that are meant.
        paths: of all sites of the twin.
    """
    return tuple(p for p in _generalized(some, paths, (_ANY, _ALL_BUT_LAST)) if _ALL_BUT_LAST in p.split("."))


def generalize(some: Collection[str], paths: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns that mean ``some`` of a twin's ``paths``, and no other of them.

    Where all layers agree the pattern means every layer; where only the first is meant, or only the last while an
    earlier one of the same make is not, it means that one. Other paths have no pattern: a layer in between, or the
    only one of its kind, tells nothing about another model's layers.

    Args:
        some: the paths that are meant.
        paths: of all sites of the twin.
    """
    return _generalized(some, paths, (_ANY, _FIRST, _LAST))


def _generalized(some: Collection[str], paths: Sequence[str], places: Sequence[str]) -> tuple[str, ...]:
    wanted = set(some)
    by_template: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_template[_template(path)].append(path)
    lasts = _Lasts(paths)
    found = []
    for template, members in by_template.items():
        meant = wanted.intersection(members)
        candidates = _candidates(template, places) if meant else ()
        exact = (p for p in candidates if {m for m in members if _matches(p, m, lasts)} == meant)
        pattern = next(exact, None)
        if pattern is not None and _holds_elsewhere(pattern, meant, members, lasts):
            found.append(pattern)
    return tuple(found)


def meant_by(patterns: Iterable[str], paths: Sequence[str]) -> frozenset[str]:
    """Return the paths of a model's sites that the patterns mean.

    Args:
        paths: of all sites of the model.
    """
    by_template: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        by_template[_template(pattern)].append(pattern)
    lasts = _Lasts(paths)
    return frozenset(
        path for path in paths if any(_matches(p, path, lasts) for p in by_template.get(_template(path), ()))
    )


class _Lasts:
    """The last number of each list of modules, and which sites each of its members has."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        self._sites: dict[str, set[str]] = defaultdict(set)
        for path in paths:
            parts = path.split(".")
            for at in _numbers(parts):
                prefix, number = ".".join(parts[:at]), int(parts[at])
                self._last[prefix] = max(number, self._last.get(prefix, 0))
                self._sites[f"{prefix}.{number}"].add(".".join(parts[at + 1 :]))

    def is_last(self, prefix: str, number: str) -> bool:
        return int(number) == self._last[prefix]

    def sites_of(self, member: str) -> set[str]:
        return self._sites[member]


def _template(path: str) -> str:
    return ".".join(_ANY if _is_number(part) else part for part in path.split("."))


def _is_number(part: str) -> bool:
    return part in {_ANY, _LAST, _ALL_BUT_LAST} or part.isdigit()


def _numbers(parts: Sequence[str]) -> list[int]:
    return [at for at, part in enumerate(parts) if _is_number(part)]


def _candidates(template: str, places: Sequence[str]) -> list[str]:
    """Return the patterns of a template with these in the places of numbers, those that mean most first."""
    parts = template.split(".")
    numbers = _numbers(parts)
    choices = sorted(product(places, repeat=len(numbers)), key=lambda one: -one.count(_ANY))
    found = []
    for choice in choices:
        filled = dict(zip(numbers, choice, strict=True))
        found.append(".".join(filled.get(at, part) for at, part in enumerate(parts)))
    return found


def _matches(pattern: str, path: str, lasts: _Lasts) -> bool:
    wanted, parts = pattern.split("."), path.split(".")
    for at, (want, part) in enumerate(zip(wanted, parts, strict=True)):
        if want in {_LAST, _ALL_BUT_LAST} and lasts.is_last(".".join(parts[:at]), part) is not (want == _LAST):
            return False
        if want not in {_ANY, _LAST, _ALL_BUT_LAST, part}:
            return False
    return True


def _holds_elsewhere(pattern: str, meant: Collection[str], members: Sequence[str], lasts: _Lasts) -> bool:
    """Check whether a pattern for the last of a list, or for all but that, would hold in a longer list.

    It does where an earlier member with the same sites is not meant, or where several are and the last is not: it
    is being the last that decides, and not being of a kind of its own, or being the first.
    """
    for at, part in enumerate(pattern.split(".")):
        if part == _ALL_BUT_LAST and len({path.split(".")[at] for path in meant}) < _SEVERAL:
            return False
        if part not in {_LAST, _ALL_BUT_LAST}:
            continue
        owners = {tuple(path.split(".")[: at + 1]) for path in meant}
        others = {tuple(path.split(".")[: at + 1]) for path in members} - owners
        for owner in owners:
            makes = [lasts.sites_of(".".join(other)) for other in others if other[:-1] == owner[:-1]]
            if lasts.sites_of(".".join(owner)) not in makes:
                return False
    return True
