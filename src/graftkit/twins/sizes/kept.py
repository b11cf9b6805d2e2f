"""Which fields of a configuration a twin leaves at full size, written as patterns.

``hidden_size``
    This field of the configuration itself.
``vision_config.hidden_size``
    This field of a part; parts of parts are dotted too.
``vision_config.num_hidden_layers[:6]``
    The first six of the layers that this field counts, in place of the fewest that show every kind.
``vision_config.*``
    All widths of a part, and of the parts inside it.
``.*``
    All widths of the configuration itself, without its parts.
``*``
    Everything but what only repeats: layers, experts, and vocabulary entries.
``**``
    These too.

A field that counts or lists layers stands for its part's layers as a whole: of these, all or none are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

OWN_WIDTHS = ".*"
EVERY_WIDTH = "*"
EVERYTHING = "**"
_FIRST_LAYERS = re.compile(r"(?P<path>.+)\[:(?P<number>\d+)\]")


def first_layers(path: str, number: int) -> str:
    """Return the pattern that keeps the first layers of those that a field counts."""
    return f"{path}[:{number}]"


@dataclass(frozen=True)
class Kept:
    """The fields that one part of a configuration keeps.

    Attributes:
        patterns: those of the whole configuration.
        part: dotted path of the part, "" for the configuration itself.
    """

    patterns: frozenset[str]
    part: str = ""

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Kept:
        return cls(frozenset(patterns))

    def inside(self, name: str) -> Kept:
        """Return what a part of this part keeps."""
        return replace(self, part=self.path(name))

    def path(self, name: str) -> str:
        """Return the dotted path of one of the part's fields."""
        return f"{self.part}.{name}" if self.part else name

    @property
    def everything(self) -> bool:
        """Whether the layers are kept too, so that nothing is left that a family would have to set right."""
        return EVERYTHING in self.patterns

    @property
    def widths(self) -> bool:
        """Whether the part keeps all of its widths."""
        if self.patterns & {EVERY_WIDTH, EVERYTHING}:
            return True
        if not self.part:
            return OWN_WIDTHS in self.patterns
        names = self.part.split(".")
        return any(".".join((*names[:end], "*")) in self.patterns for end in range(1, len(names) + 1))

    def has(self, name: str) -> bool:
        """Check whether a field is named."""
        return self.path(name) in self.patterns

    def of_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the named ones of these fields."""
        return {name: value for name, value in fields.items() if self.has(name)}

    @property
    def first_layers(self) -> int | None:
        """How many of the part's layers are kept from the first on, where a pattern says so."""
        found = (_FIRST_LAYERS.fullmatch(pattern) for pattern in self.patterns)
        numbers = (
            int(match["number"]) for match in found if match and match["path"].rpartition(".")[0] == self.part
        )
        return next(numbers, None)

    def without(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Return these changes but those of named fields."""
        return {name: value for name, value in changed.items() if not self.has(name)}
