"""Weights that a checkpoint has under other names than the class: with or without a wrapper, or a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftkit.surveying.checkpoint.headers import TensorHeader
from graftkit.surveying.checkpoint.keys import stored_shapes

if TYPE_CHECKING:
    from torch import nn

_Parts = tuple[str, ...]


def find_renaming(
    model: nn.Module,
    headers: Mapping[str, TensorHeader],
    unknown: Iterable[str],
    weights: Iterable[str],
    buffers: Iterable[str] = (),
) -> dict[str, str]:
    """Return key in the files -> the key that the class expects, or nothing where that is not all that is wrong.

    One change must lead from every missing weight to a tensor of its shape that the class does not load: parts
    added or left out around the last module (``q_proj.weight``, ``q_proj.linear.weight``), or at the front
    (``module.model.layers…``). Buffers that the same change finds are renamed too.

    Args:
        model: for the names and shapes that its class expects on disk.
        headers: of the files.
        unknown: keys in the files that the class does not load.
        weights, buffers: names in the model that no file has.
    """
    shapes = {key: tuple(headers[key].shape) for key in unknown}
    needed = _on_disk(model, weights)
    optional = _on_disk(model, buffers)
    first, shape = next(iter(needed.items()))
    changes = dict.fromkeys(change for key in shapes if shapes[key] == shape for change in _changes(first, key))
    for change in changes:
        keys = {name: change.apply(name) for name in (*needed, *optional)}
        if all(shapes.get(keys[name] or "") == shape for name, shape in needed.items()):
            return {
                key: name for name, key in keys.items() if key and shapes.get(key) == (needed | optional)[name]
            }
    return {}


def _on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {key: shape for stored in stored_shapes(model, names).values() for key, shape in stored.items()}


@dataclass(frozen=True)
class _Change:
    """Parts of a name that the files have and the class does not, or the other way round.

    Attributes:
        in_files, in_class: at least one of them is empty.
        tail: how many parts of the name follow: 1 for a parameter inside a wrapper, None for a prefix.
    """

    in_files: _Parts
    in_class: _Parts
    tail: int | None

    def apply(self, name: str) -> str | None:
        """Return the key in the files of what the class calls ``name``; None where it lacks the parts."""
        parts = tuple(name.split("."))
        at = 0 if self.tail is None else len(parts) - self.tail - len(self.in_class)
        end = at + len(self.in_class)
        if at < 0 or parts[at:end] != self.in_class:
            return None
        return ".".join((*parts[:at], *self.in_files, *parts[end:]))


def _changes(name: str, key: str) -> Iterable[_Change]:
    """Yield the changes that lead from a name of the class to a key in the files."""
    wanted, found = tuple(name.split(".")), tuple(key.split("."))
    more = len(found) - len(wanted)
    longer, count = (found, more) if more > 0 else (wanted, -more)
    inner, front = longer[-1 - count : -1], longer[:count]
    for run, tail in ((inner, 1), (front, None)):
        change = _Change(run, (), tail) if more > 0 else _Change((), run, tail)
        if more and change.apply(name) == key:
            yield change
