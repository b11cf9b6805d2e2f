"""A wrapper's name -> the linears inside, in every field of a PEFT configuration that names modules."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from graftkit.modeling.unwrapping import base_layer_of
from graftkit.planning.matching import (
    as_whole_path,
    inside_of,
    is_all_linear,
    key_matches,
    rewritten_names,
    smallest_exact,
    value_at,
    whole_modules,
)
from graftkit.surveying.kinds import LINEAR, TRANSPOSED, kind_of
from graftkit.surveying.wrappers import composites_of, wrappers_of
from graftkit.text import some

if TYPE_CHECKING:
    from torch import nn

_Config = TypeVar("_Config")
_log = logging.getLogger(__name__)

# Fields that take targets away again.
_NO_FILTERS: Mapping[str, None] = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}

# How PEFT reads one configuration against one path; ``BaseTuner._check_target_module_exists`` of a tuner.
Matches = Callable[[Any, str], Any]


@dataclass(frozen=True)
class ModelPaths:
    """The module paths of a model, as PEFT matches them.

    Attributes:
        paths: every path, without the insides of adapter layers: PEFT never matches those.
        inner: path of a wrapper (every level, where they nest) -> path of the linear inside it. A linear that
            carries an adapter already counts as the linear it is.
        composites: path of a module composed of linears -> the paths of those linears.
        model_type: transformers' model type, or None.
    """

    paths: tuple[str, ...]
    inner: Mapping[str, str]
    model_type: str | None
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelPaths:
        modules = _visible(model)
        linears = frozenset(path for path, module in modules.items() if path and _is_linear(module))
        wrappers = wrappers_of(model, linears)
        inner = {
            level: path
            for path in modules
            if path in wrappers
            for level in wrappers[path].levels(path)
            if not _accepted_by_peft(modules[level])
        }
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        paths = tuple(path for path in modules if path)
        return cls(paths, inner, model_type, composites_of(model, linears))

    def inside(self, name: str) -> tuple[str, ...]:
        """Return the linears inside the wrapper or composite at a path; none where it is neither."""
        return (self.inner[name],) if name in self.inner else self.composites.get(name, ())


def _is_linear(module: nn.Module) -> bool:
    """Check whether a module is a linear, quantized or not, or an adapter layer around one."""
    return kind_of(base_layer_of(module)) in {LINEAR, TRANSPOSED}


def excluding_whole(config: _Config, model_paths: ModelPaths) -> _Config:
    """Return a configuration that excludes what lies inside the modules that ``exclude_modules`` lists.

    PEFT excludes only modules whose path ends with an entry: no layer of a tower that is named. As a regular
    expression the entries stand for the modules and everything inside them.

    Returns:
        ``config`` itself where nothing lies inside what it lists, or it has a regular expression; else a copy.
    """
    entries = getattr(config, "exclude_modules", None)
    if not entries or isinstance(entries, str):
        return config
    if not any(inside_of(entry, model_paths.paths) for entry in entries):
        return config
    return _with(config, exclude_modules=whole_modules(entries))


def redirected(config: _Config, model_paths: ModelPaths, matches: Matches) -> _Config:
    """Return a configuration whose targets are inner linears where the given one names the modules around them.

    Exactly those modules are targeted that the given configuration targets, each wrapper replaced by the linear
    inside it, and each composite by all of its linears, which is logged. A wrapper is left out where
    ``exclude_modules`` names it or its linear, and where ``layers_to_transform`` leaves its layer out. Patterns
    ("rank_pattern" and the like) and IA3's ``feedforward_modules`` that name a redirected wrapper name its linear
    afterwards.

    Args:
        config: any PEFT configuration. It is never changed.
        model_paths: of the model it is for.
        matches: the tuner's own reading of a configuration.

    Returns:
        ``config`` itself where it names no wrapper, else a copy.
    """
    targets = getattr(config, "target_modules", None)
    if not (model_paths.inner or model_paths.composites) or not targets or is_all_linear(targets):
        return config
    named = [path for path in model_paths.paths if matches(config, path)]
    around = _modules_around(named, targets, model_paths)
    named_by = {linear: path for path in around for linear in model_paths.inside(path)}
    if not named_by:
        return config
    kept = {path: path for path in named if path not in around}
    allowed = {path: name for path, name in named_by.items() if matches(_with_targets(config, [path]), path)}
    names = {**allowed, **kept}
    if not names:
        # Everything is excluded, which PEFT reports.
        return _with_targets(config, sorted(named_by))
    planned = [path for path in model_paths.paths if path in names]
    composed = [path for path in planned if names[path] in model_paths.composites]
    if composed:
        _log.warning(
            "%s in target_modules: PEFT adapts linears, so the %d inside get adapters: %s",
            some(dict.fromkeys(names[path] for path in composed)),
            len(composed),
            some(composed),
        )
    exact = retargeted(config, planned, model_paths, matches)
    return renamed(exact, {path: names[path] for path in planned})


def _modules_around(named: Sequence[str], targets: Any, model_paths: ModelPaths) -> Mapping[str, None]:
    """Return which of the named modules stand for linears inside them, outer ones first.

    Not a composite that a regular expression matches together with only some of its linears: whether the others
    are meant cannot be known, and PEFT refuses it.
    """
    linears = {model_paths.inner.get(path, path) for path in named}

    def is_clear(path: str) -> bool:
        inside = model_paths.composites.get(path, ())
        return not isinstance(targets, str) or linears.isdisjoint(inside) or linears.issuperset(inside)

    return {path: None for path in named if model_paths.inside(path) and is_clear(path)}


def holding_others(config: Any, model_paths: ModelPaths, matches: Matches) -> tuple[str, ...]:
    """Return the targeted modules that hold other modules, which PEFT cannot adapt."""
    holders = {path.rpartition(".")[0] for path in model_paths.paths}
    return tuple(path for path in model_paths.paths if path in holders and matches(config, path))


def retargeted(config: _Config, planned: Sequence[str], model_paths: ModelPaths, matches: Matches) -> _Config:
    """Return a copy of ``config`` that targets exactly the ``planned`` module paths, in its smallest form.

    ``layers_to_transform`` is kept where a list of suffixes can still go with it, and becomes layer numbers in a
    regular expression otherwise: PEFT refuses it beside one. ``exclude_modules`` is dropped where it would exclude
    something planned.

    Args:
        config: never changed.
        planned: in the order of ``model_paths.paths``.
        model_paths: of the model it is for.
        matches: the tuner's own reading of a configuration.
    """
    for candidate in _candidates(config, planned, model_paths, matches):
        if [path for path in model_paths.paths if matches(candidate, path)] == list(planned):
            return candidate
    return _with_targets(config, sorted(planned), **_NO_FILTERS)


def _candidates(
    config: _Config, planned: Sequence[str], model_paths: ModelPaths, matches: Matches
) -> Iterable[_Config]:
    if getattr(config, "layers_to_transform", None) is not None:
        every = _without_layer_filter(config, planned, model_paths, matches)
        yield _with_targets(config, smallest_exact(every, model_paths.paths, regex_is_safe=False))
    safe = not rewritten_names(model_paths.model_type)
    targets = smallest_exact(planned, model_paths.paths, regex_is_safe=safe)
    yield _with_targets(config, targets, layers_to_transform=None, layers_pattern=None)
    yield _with_targets(config, targets, **_NO_FILTERS)


def _without_layer_filter(
    config: Any, planned: Sequence[str], model_paths: ModelPaths, matches: Matches
) -> list[str]:
    """Return the planned paths, and those of the same name in every other layer."""
    open_to_all = _with(config, layers_to_transform=None, layers_pattern=None)
    named = (path for path in model_paths.paths if matches(open_to_all, path))
    every = {linear for path in named for linear in model_paths.inside(path) or (path,)} | set(planned)
    return [path for path in model_paths.paths if path in every]


def renamed(config: _Config, names: Mapping[str, str]) -> _Config:
    """Return a copy of ``config`` whose patterns say about each path what they said about its former name.

    Args:
        config: already targets the keys of ``names``.
        names: path of a target -> the name that the configuration's patterns know it by.
    """
    changes: dict[str, Any] = {
        name: rekeyed(value, names)
        for name, value in vars(config).items()
        if name.endswith("_pattern") and isinstance(value, dict) and value
    }
    feedforward = getattr(config, "feedforward_modules", None)
    if feedforward:
        changes["feedforward_modules"] = _feedforward(feedforward, names)
    return _with(config, **changes)


def rekeyed(pattern: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a PEFT pattern that gives each path the value that ``pattern`` gives its name, in the same order.

    The keys keep their spelling where one of them can be said of the path too; otherwise full paths go first.

    Source: ``peft.utils.other.get_pattern_key`` (the first key that matches the end of a path wins).
    """
    wanted = {path: _value(pattern, name, path) for path, name in names.items()}
    moved = {path: name for path, name in names.items() if name != path}
    stay = [path for path, name in names.items() if name == path]
    for candidate in (dict(pattern), _extended(pattern, moved, stay)):
        if all(_value(candidate, path) == value for path, value in wanted.items()):
            return candidate
    exact = {re.escape(path): wanted[path] for path in moved if wanted[path] is not _MISSING}
    # A key that only named wrappers would match nothing now, and PEFT would warn of it.
    rest = {k: v for k, v in pattern.items() if not _any_match(k, moved.values()) or _any_match(k, stay)}
    return {**exact, **rest}


# ---- how PEFT reads patterns ----

_MISSING = object()


def _value(pattern: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first name that has one."""
    values = (value_at(pattern, name, _MISSING) for name in names)
    return next((value for value in values if value is not _MISSING), _MISSING)


def _any_match(key: str, paths: Iterable[str]) -> bool:
    return any(key_matches(key, path) for path in paths)


def _extended(pattern: Mapping[str, Any], moved: Mapping[str, str], stay: Sequence[str]) -> dict[str, Any]:
    """Let each key that names a wrapper name what is inside too, or only that."""
    result = {}
    for key, value in pattern.items():
        tails = {path.removeprefix(name) for path, name in moved.items() if key_matches(key, name)}
        if tails:
            tail = "|".join(re.escape(tail) for tail in sorted(tails))
            optional = "?" if _any_match(key, stay) else ""
            plain = re.fullmatch(r"[\w.]+", key) is not None
            grouped = f"(?:{tail})" if optional or len(tails) > 1 else tail
            key = f"{key if plain else f'(?:{key})'}{grouped}{optional}"
        result[key] = value
    return result


# ---- IA3's second list ----


def _feedforward(feedforward: Any, names: Mapping[str, str]) -> Any:
    """Return IA3's feed-forward modules by path.

    A regular expression, because IA3 wants a list to repeat the entries of ``target_modules`` exactly, and
    matches the entries of a list inside a name too.

    Source: ``peft.tuners.ia3.model.IA3Model._check_target_module_feedforward``.
    """
    if all(name == path for path, name in names.items()):
        return feedforward
    planned = [path for path, name in names.items() if any(_is_feedforward(feedforward, n) for n in (name, path))]
    if not planned:
        return type(feedforward)()
    return as_whole_path(smallest_exact(planned, list(names)))


def _is_feedforward(feedforward: Any, name: str) -> bool:
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    return any(name.endswith(entry) for entry in feedforward)


# ---- configurations and modules ----


def _with_targets(config: _Config, targets: str | list[str], **changes: Any) -> _Config:
    """Return a copy with other targets; PEFT keeps lists of targets as sets."""
    present = {name: value for name, value in changes.items() if hasattr(config, name)}
    return _with(config, target_modules=targets if isinstance(targets, str) else set(targets), **present)


def _with(config: _Config, **changes: Any) -> _Config:
    # A shallow copy: building the dataclass again would check, and change, fields that have nothing to do with it.
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _visible(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module PEFT would match, by path. Source: ``BaseTuner.inject_adapter``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    visible: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for path, module in model.named_modules():
        if adapted and path.startswith(adapted[-1]):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{path}.")
        visible[path] = module
    return visible


def _accepted_by_peft(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) or kind_of(module) is not None
