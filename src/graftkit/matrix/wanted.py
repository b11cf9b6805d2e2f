"""The families that people fine-tune, and those of this year: every method of PEFT is tried on them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("wanted.toml")


@cache
def wanted() -> Mapping[str, str]:
    """Return model type -> why it is on the list."""
    groups = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    wanted = [group for group in groups.values() if group.get("wanted", True)]
    return {name: group["why"] for group in wanted for name in group["types"]}
