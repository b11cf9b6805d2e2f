"""In what a twin's structure differs from the full model's: compared module by module, without weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=\.|$)")


@dataclass(frozen=True)
class Difference:
    """One thing in which two structures differ.

    Attributes:
        aspect: "module", "layer", "parameter" or "tie".
        what: its path without numbers, and what stands there.
        lost: whether the full model alone has it; else the twin alone has it.
    """

    aspect: str
    what: str
    lost: bool

    def __str__(self) -> str:
        return f"{'lost' if self.lost else 'added'} {self.aspect} {self.what}"


def differences(full: nn.Module, twin: nn.Module) -> tuple[Difference, ...]:
    """Return in what the structure of a twin differs from that of the model it stands for.

    Compared are, without the numbers in paths: which class each module has, and how its channels are grouped;
    which kinds of members each list of modules has, a kind being all that is inside one of them; which parameters
    there are, and how many axes each has; and which are one and the same.

    Args:
        full: the full model; on the meta device it needs no memory.
        twin: its twin, on any device.
    """
    found: list[Difference] = []
    before, after = _aspects(full), _aspects(twin)
    for aspect, had in before.items():
        has = after[aspect]
        found += [Difference(aspect, had[key], lost=True) for key in had if key not in has]
        found += [Difference(aspect, has[key], lost=False) for key in has if key not in had]
    return tuple(sorted(found, key=str))


def _aspects(model: nn.Module) -> dict[str, Mapping[Hashable, str]]:
    return {
        "module": dict(_modules(model)),
        "layer": dict(_layers(model)),
        "parameter": dict(_parameters(model)),
        "tie": dict(_ties(model)),
    }


def _modules(model: nn.Module) -> Iterator[tuple[Hashable, str]]:
    for path, module in model.named_modules():
        key = (unnumbered(path), type(module).__name__, _grouping(module))
        yield key, f"{key[0]} ({key[1]}{key[2]})"


def _grouping(module: nn.Module) -> str:
    """Tell depthwise from grouped from full convolutions; where there is one channel, they are the same."""
    from torch import nn

    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups == 1:
        return ""
    return ", depthwise" if module.groups == module.in_channels else ", grouped"


def _layers(model: nn.Module) -> Iterator[tuple[Hashable, str]]:
    from torch import nn

    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for member in module.children():
                kind = frozenset(key for key, _ in _modules(member))
                parameters = frozenset(key for key, _ in _parameters(member))
                yield (unnumbered(path), kind, parameters), f"{unnumbered(path)} ({type(member).__name__})"


def _parameters(model: nn.Module) -> Iterator[tuple[Hashable, str]]:
    for path, parameter in model.named_parameters(remove_duplicate=False):
        key = (unnumbered(path), parameter.ndim)
        yield key, f"{key[0]} ({key[1]} axes)"


def _ties(model: nn.Module) -> Iterator[tuple[Hashable, str]]:
    names: dict[int, set[str]] = defaultdict(set)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(unnumbered(path))
    for group in names.values():
        if len(group) > 1:
            yield frozenset(group), " = ".join(sorted(group))


def unnumbered(path: str) -> str:
    """Return a module's path with every number replaced by N, so that layers alike have one."""
    return _NUMBER.sub("N", path)
