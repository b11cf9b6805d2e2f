"""Which tower feeds the modules beside an input's entry: the widths they take in and give out tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graftkit.surveying.sites import UNKNOWN_TOWER
from graftkit.surveying.towers.modules import NORM, Modules, ancestors, is_inside
from graftkit.surveying.towers.names import (
    comes_with_text,
    is_precomputed,
    is_text,
    may_be_anything,
    modalities_named,
    tower_named,
    words_of,
)

_TEXT = "language"
_MOST_MERGED = 16  # neighbouring patches or frames that a projector may take at once


def outermost(sources: Mapping[str, str]) -> dict[str, str]:
    """Return the largest modules that take one tower's inputs alone, each with that tower."""
    inside = _towers_inside(sources)
    alone = {path: next(iter(towers)) for path, towers in inside.items() if len(towers) == 1}
    return {path: tower for path, tower in alone.items() if not path or path.rpartition(".")[0] not in alone}


def _towers_inside(placed: Mapping[str, str]) -> dict[str, set[str]]:
    inside: dict[str, set[str]] = {}
    for path, tower in placed.items():
        for at in (path, *ancestors(path)):
            inside.setdefault(at, set()).add(tower)
    return inside


class Neighbours:
    """Places the modules that take no input of the model, one container after the other, the deepest first.

    What takes only the width that text comes in is the language model's; what turns another tower's width into
    that one is a projector; what takes neither is fed by something unseen. Where text and another input have the
    same width, or the model takes more than is seen to enter it, only the one stack of layers that text can pass
    through is the language model's; for the others there are names.
    """

    def __init__(
        self, modules: Modules, sources: Mapping[str, str], claims: Mapping[str, str], *, after_text: str
    ) -> None:
        """
        Args:
            sources: path -> tower of the modules that take an input of the model.
            claims: path -> tower of the modules that are not to be looked into.
            after_text: the tower of what takes what the language model gives out.
        """
        self._modules, self._sources, self._claims, self._after = modules, sources, claims, after_text
        self._placed = {"": UNKNOWN_TOWER, **outermost(sources)}
        self._widths: dict[str, set[int]] = {}
        for path, tower in (*self._placed.items(), *sources.items()):
            # A module around an embedding gives out what its layers make of it: that is found step by step.
            if path and (tower != _TEXT or path in sources):
                self._give_out(path, tower)
        self._has_layers = _TEXT in claims.values()
        self._arguments = self._outer_arguments()
        self._takes_more = self._takes_unseen()

    def place(self) -> dict[str, str]:
        """Return path -> tower of the modules that decide for what lies in them, the root among them."""
        only_text = set(self._sources.values()) == {_TEXT} and not self._takes_more
        if not (only_text and all(comes_with_text(name) for name in self._arguments)):
            for container in self._containers():
                self._place_children(container)
        return self._placed

    # ---- what to place ----

    def _containers(self) -> list[str]:
        """Return the modules around what takes text in, and those around several towers, the deepest first."""
        around_text = (at for path, tower in self._sources.items() if tower == _TEXT for at in ancestors(path))
        around_towers = (at for path in self._placed if path for at in ancestors(path))
        found = {at for at in (*around_text, *around_towers) if not self._is_hidden(at)}
        return sorted(found, key=lambda path: -len(path.split(".")) if path else 0)

    def _is_hidden(self, path: str) -> bool:
        return not self._claims.keys().isdisjoint((path, *ancestors(path)))

    def _beside(self, container: str) -> list[str]:
        """Return the children of a container that hold weights and take no input of the model."""
        return [
            child
            for child in self._modules.children(container)
            if not self._is_hidden(child)
            and not any(is_inside(path, child) for path in self._sources)
            and any(layer.kind != NORM for layer in self._modules.inside(child))
        ]

    def _outer_arguments(self) -> dict[str, bool]:
        """Return what the model's forward takes, below the modules that only hold it."""
        path = ""
        while len(children := self._modules.children(path)) == 1 and not self._is_hidden(children[0]):
            path = children[0]
        return self._modules.arguments(path)

    def _takes_unseen(self) -> bool:
        """Check whether the model's forward takes an input that no module is seen to take."""
        seen = {*self._sources.values(), *self._placed.values(), "projector"}
        named = {name: next(iter(modalities_named([name])), None) for name in self._arguments}
        others = [name for name, tower in named.items() if tower is None]
        strange = [name for name in others if self._arguments[name] and not comes_with_text(name)]
        return (
            not seen.issuperset(tower for tower in named.values() if tower)
            or any(is_precomputed(name) and tower_named(name) not in seen for name in others)
            # Where no argument is named as text, one of a name that says nothing is the text.
            or len(strange) > (0 if any(map(is_text, self._arguments)) else 1)
            or may_be_anything(self._arguments)
        )

    # ---- where to ----

    def _place_children(self, container: str) -> None:
        waiting = self._beside(container)
        if self._is_joint(container):
            for child in waiting:
                self._put(child, self._after_text(child))
            return
        # In the order in which they were registered: what a head gives out is not what comes in.
        while ready := [c for c in waiting if self._tower_of(c) or not self._may_take_text(c)]:
            self._put(ready[0], self._tower_of(ready[0]) or self._by_name(ready[0]) or UNKNOWN_TOWER)
            waiting.remove(ready[0])
        # Structure first, then names; what these leave may be the one stack there is.
        for tower_of in (self._only_stack, self._by_name, self._only_stack):
            for place in list(waiting):
                if tower := tower_of(place, waiting):
                    self._put(place, tower)
                    waiting.remove(place)
        for place in waiting:
            self._put(place, UNKNOWN_TOWER)

    def _is_joint(self, container: str) -> bool:
        """Check whether text and all else enter through one child, so that what follows takes them together."""
        from torch import nn

        inside = _towers_inside({path: tower for path, tower in {**self._placed, **self._sources}.items() if path})
        holders = [child for child in self._modules.children(container) if child in inside]
        if len(holders) != 1 or _TEXT not in inside[holders[0]]:
            return False
        one_stream = isinstance(self._modules.by_path[container], nn.Sequential)
        return one_stream or (len(inside[holders[0]]) > 1 and not self._takes_unseen())

    def _tower_of(self, child: str) -> str | None:
        """Return the tower that the widths tell; None where they do not."""
        into, makes_text = self._modules.takes(child), self._modules.gives(child) in self._widths.get(_TEXT, ())
        feeders = {tower for tower, known in self._widths.items() if into in known}
        if _TEXT in feeders:
            unclear = len(feeders) > 1 or (self._takes_more and makes_text)
            return None if unclear and not self._makes_tokens(child) else self._after_text(child)
        others = {width for tower, known in self._widths.items() if tower != _TEXT for width in known}
        merges = into is not None and any(into % width == 0 and into // width <= _MOST_MERGED for width in others)
        if makes_text and merges:
            return "projector"
        return next(iter(feeders)) if len(feeders) == 1 else None

    def _makes_tokens(self, child: str) -> bool:
        """Check for a layer with as many outputs as there are tokens."""
        tables = (self._modules.by_path[path] for path, tower in self._sources.items() if tower == _TEXT)
        rows = {getattr(table, "num_embeddings", None) for table in tables}
        return child in self._modules.layers and self._modules.layers[child].out in rows

    def _may_take_text(self, child: str) -> bool:
        return self._modules.takes(child) in self._widths.get(_TEXT, ())

    def _only_stack(self, child: str, waiting: Sequence[str]) -> str | None:
        """Return "language" for the only stack of layers that text can pass through."""
        stacks = [other for other in waiting if self._modules.is_stack(other)]
        return _TEXT if stacks == [child] and not self._has_layers else None

    def _after_text(self, child: str) -> str:
        return _TEXT if self._modules.is_stack(child) and not self._has_layers else self._after

    def _by_name(self, path: str, _: Sequence[str] = ()) -> str | None:
        """Return the tower that the module's name or its class's says, without the words of the model's class."""
        general = words_of(type(self._modules.by_path[""]).__name__)
        cls = [word for word in words_of(type(self._modules.by_path[path]).__name__) if word not in general]
        return tower_named(path.rpartition(".")[2], " ".join(cls))

    def _put(self, path: str, tower: str) -> None:
        self._placed[path] = tower
        self._has_layers = self._has_layers or (tower == _TEXT and self._modules.is_stack(path))
        self._give_out(path, tower)

    def _give_out(self, path: str, tower: str) -> None:
        layers = self._modules.inside(path)
        if layers and tower != "projector":
            self._widths.setdefault(tower, set()).update((layers[0].out, layers[-1].out))
