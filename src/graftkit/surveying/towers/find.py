"""Which tower a module belongs to: from what the model declares, then from its structure, then from names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from graftkit.surveying.sites import UNKNOWN_TOWER
from graftkit.surveying.towers.copies import copies_of
from graftkit.surveying.towers.declared import declared_towers, stated_towers
from graftkit.surveying.towers.entries import find_entries
from graftkit.surveying.towers.modules import Modules, is_inside
from graftkit.surveying.towers.names import modalities_named, tower_named
from graftkit.surveying.towers.neighbours import Neighbours, outermost

if TYPE_CHECKING:
    from torch import nn

_TAKE_INPUTS = frozenset(("language", "vision", "audio", UNKNOWN_TOWER))


def tower_finder(model: nn.Module) -> Callable[[str], str]:
    """Return a function from module path to tower name for this model.

    The deepest assignment above a path wins. A model's declarations come first: the modules that own a
    sub-configuration, ``get_encoder``/``get_decoder``, the heads, transformers models that it holds. Then its
    structure: the modules around the layers that take pixels, sound or text in, and for their neighbours the
    widths that say which of these feeds them. What neither tells, names tell, or the tower is "unknown".
    """
    assigned = _assign(model)

    def tower_of(path: str) -> str:
        while path not in assigned:
            path = path.rpartition(".")[0]
        return assigned[path]

    return tower_of


def _assign(model: nn.Module) -> dict[str, str]:
    """Return path -> tower of the modules that decide for what lies in them; the root, "", is among them."""
    from transformers import PreTrainedModel

    is_whole, stated = isinstance(model, PreTrainedModel), stated_towers(model)
    claims = _resolved(model, declared_towers(model)) if is_whole else {}
    declared = {tower for tower in claims.values() if tower != "head"}
    if len(stated) == 1 and stated != ("language",) and declared <= set(stated):
        return {"": stated[0], **claims}
    if len(declared - {UNKNOWN_TOWER}) < 2 or "language" not in declared:
        claims |= _held(model, claims)
    modules = Modules.of(model)
    sources = {path: tower for path, tower in claims.items() if tower in _TAKE_INPUTS}
    sources |= find_entries(modules, claims)
    towers = set(sources.values())
    if towers <= {"language"} and is_whole and _says_text(model):
        return {"": "language", **claims}
    if not towers:
        return {"": _without_entries(model, modules, stated), **claims}
    if len(towers) == 1 and "language" not in towers and (is_whole or not claims):
        return {"": next(iter(towers)), **claims}
    if "language" in declared and len(declared - {UNKNOWN_TOWER}) > 1:
        entries = {path: tower for path, tower in outermost(sources).items() if tower != "language"}
        return {"": "projector", **entries, **copies_of(claims, modules), **claims}
    after = "head" if not is_whole and "language" in claims.values() else "language"
    return {**Neighbours(modules, sources, claims, after_text=after).place(), **claims}


def _resolved(model: nn.Module, declared: dict[str, str | None]) -> dict[str, str]:
    """Return what a model declares, with the towers of which it does not say what they are as they are found."""
    found: dict[str, str] = {}
    for path, tower in declared.items():
        found |= {path: tower} if tower else _below(path, _assign(model.get_submodule(path)))
    return found


def _held(model: nn.Module, claims: Collection[str]) -> dict[str, str]:
    """Return path -> tower in the transformers models inside, beside the modules claimed already.

    A model inside that shares the outer one's configuration is a part of it (the one without a head).
    """
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or not isinstance(module, PreTrainedModel) or module.config is config:
            continue
        if not any(is_inside(path, at) or is_inside(at, path) for at in (*claims, *found)):
            found |= _below(path, _assign(module))
    return found


def _below(path: str, inner: dict[str, str]) -> dict[str, str]:
    return {f"{path}.{at}" if at else path: tower for at, tower in inner.items()}


def _says_text(model: Any) -> bool:
    """Check whether transformers says that one of its own classes takes text alone; others only inherit that."""
    own = type(model).__module__.partition(".")[0] == "transformers"
    return own and stated_towers(model) in ((), ("language",)) and model.main_input_name == "input_ids"


def _without_entries(model: nn.Module, modules: Modules, stated: tuple[str, ...]) -> str:
    """Return the tower of a model in which nothing is seen to take an input in."""
    named = modalities_named(modules.arguments(""))
    if len(named) == 1:
        return next(iter(named))
    return next(iter(stated), None) or tower_named(type(model).__name__) or UNKNOWN_TOWER
