"""The user's settings of the checks: which rules, how severe, with which limits."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from graftkit.errors import RecipeError
from graftkit.recipes.problems import problems


class CheckSettings(BaseModel):
    """Settings of the checks, from ``[tool.graftkit]`` of a pyproject.toml or ``checks:`` of a recipe.

    Of two prefixes the longer one wins; of equal ones, ``ignore``. Every rule has a setting ``severity``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    select: tuple[str, ...] = Field(default=(), description="Prefixes of the codes to run; empty for all.")
    ignore: tuple[str, ...] = Field(default=(), description="Prefixes of codes not to run.")
    rules: Mapping[str, Mapping[str, Any]] = Field(default={}, description="Code -> settings of that rule.")

    @field_validator("select", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def wants(self, code: str) -> bool:
        """Check whether the rule of this code is to run."""
        chosen = max((len(p) for p in self.select if code.startswith(p)), default=-1)
        refused = max((len(p) for p in self.ignore if code.startswith(p)), default=-1)
        return (not self.select or chosen >= 0) and (refused < 0 or chosen > refused)

    def over(self, other: CheckSettings) -> CheckSettings:
        """Return these settings, completed by the other ones."""
        codes = {*self.rules, *other.rules}
        merged = {code: {**other.rules.get(code, {}), **self.rules.get(code, {})} for code in codes}
        return CheckSettings(
            select=self.select or other.select, ignore=(*other.ignore, *self.ignore), rules=merged
        )


def project_settings(folder: str | Path = ".") -> CheckSettings:
    """Read ``[tool.graftkit]`` of the nearest pyproject.toml, from ``folder`` upwards; empty settings without one.

    Raises:
        RecipeError: ``settings``: the table cannot be read, or has an unknown setting.
    """
    start = Path(folder).resolve()
    for place in (start, *start.parents):
        file = place / "pyproject.toml"
        if file.is_file():
            return _read(file)
    return CheckSettings()


def _read(file: Path) -> CheckSettings:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("graftkit", {})
        return CheckSettings.model_validate(table)
    except ValidationError as error:
        found = problems(error, CheckSettings)
        raise RecipeError(
            "the settings are not valid",
            where=f"{file} [tool.graftkit] {found[0].name}".rstrip(),
            why="; ".join(f"{p.name}: {p.why}" for p in found) if found[1:] else found[0].why,
            help="; ".join(dict.fromkeys(p.advice for p in found if p.advice)) or "correct it in that file",
            code="settings",
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            "the settings cannot be read",
            where=str(file),
            why=str(error),
            help="correct that file",
            code="settings",
        ) from error
