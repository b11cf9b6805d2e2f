"""Which release of transformers first knew a model type, from a table made of the releases themselves."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from graftkit.errors import GraftError

TABLE = Path(__file__).with_name("introduced.toml")


@dataclass(frozen=True)
class Introduced:
    """The table.

    Attributes:
        released: release -> the day its wheel was made, oldest first. What the first one knew may be older.
        release_of: model type -> the first of these releases that knew it.
    """

    released: Mapping[Version, date]
    release_of: Mapping[str, Version]

    def since(self, release: str, model_types: Iterable[str]) -> tuple[str, ...]:
        """Return the model types that came after a release. One that the table does not know is newer than it all.

        Raises:
            GraftError: as :meth:`version`.
        """
        wanted = self.version(release)
        return tuple(name for name in model_types if name not in self.release_of or self.release_of[name] > wanted)

    def version(self, release: str) -> Version:
        """Return a release that model types can be compared with.

        Raises:
            GraftError: ``release-unknown``: it is not a version, or older than the first of the table.
        """
        first = min(self.released)
        try:
            wanted = Version(release)
        except InvalidVersion as error:
            raise GraftError(
                f"{release!r} is not a release of transformers",
                where="--new-since",
                why="it is not a version's number",
                help="--new-since 5.20",
                code="release-unknown",
            ) from error
        if wanted < first:
            raise GraftError(
                f"it is not known what came between transformers {release} and {first}",
                why=f"the table begins with {first}",
                help=f"--new-since {first}, or --all",
                code="release-unknown",
            )
        return wanted


@cache
def introduced() -> Introduced:
    """Return the table that comes with graftkit."""
    return read(TABLE.read_text(encoding="utf-8"))


def read(text: str) -> Introduced:
    """Read a table from TOML: for each release its ``date`` and the ``types`` that those before did not know."""
    rows = {Version(name): row for name, row in tomllib.loads(text).items()}
    order = sorted(rows)
    return Introduced(
        {version: rows[version]["date"] for version in order},
        {model_type: version for version in order for model_type in rows[version]["types"]},
    )
