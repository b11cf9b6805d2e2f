"""What a cell was made from: the versions of the libraries, and a hash of the code and data that decide it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import graftkit
from graftkit.env import version_of
from graftkit.families import family_of
from graftkit.families._known_twins import known_twins

_PACKAGES = ("graftkit", "transformers", "peft", "torch")
# The rooms, and the folders of rooms, whose code an outcome depends on. Families are hashed one by one.
_CODE = (
    "surveying",
    "modeling",
    "twins",
    "planning",
    "attaching",
    "checks/engine",
    "checks/probes",
    "checks/rules/contract",
    "checks/rules/training",
    "checks/verify.py",
    "matrix/prove.py",
    "matrix/trials",
)


@cache
def versions() -> dict[str, str]:
    """Return the version of every package that an outcome depends on."""
    return {name: version_of(name) or "unknown" for name in _PACKAGES}


def made_from(model_type: str) -> str:
    """Return a hash of graftkit's code and of what it knows of this family: it changes when an outcome may."""
    digest = hashlib.sha256(_of_code().encode())
    family = family_of(model_type)
    if family is not None:
        digest.update((_root() / "families" / f"{family.name}.py").read_bytes())
    known = (twin for twin in known_twins().values() if twin.model_type == model_type)
    digest.update(repr(sorted(known, key=lambda twin: twin.class_name)).encode())
    return digest.hexdigest()[:12]


@cache
def _of_code() -> str:
    digest = hashlib.sha256()
    for place in _CODE:
        start = _root() / place
        for file in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
            digest.update(str(file.relative_to(_root())).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _root() -> Path:
    return Path(graftkit.__file__).parent
