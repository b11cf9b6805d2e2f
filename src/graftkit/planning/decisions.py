"""What a plan does with each site, adapt it or leave it alone, and which of the targets it could not meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from graftkit.surveying.sites import ModelMap, Site


class LeftAlone(Enum):
    """Why a plan leaves a site alone. The value is the reason that people read, with blanks for the facts."""

    OUT_OF_SCOPE = "outside the scope ({tower})"
    NOT_ADAPTABLE = "{reason}"
    TIED = "its weight is tied to {other}: merging an adapter on it would change both"
    NOT_IN_ALL_LINEAR = "all-linear leaves out {kind}: name it to adapt it"
    STACKED_EXPERTS = "stacked experts: add 'experts' to the targets to adapt them"
    NO_GRADIENT = "no gradient reaches it: {cause}"
    NOT_REQUESTED = "not requested"
    NOT_BY_METHOD = "{method} cannot adapt {kind} sites"
    TOO_NARROW = "{initializer} can give it rank {most} at most, not {rank}"
    NO_RANK = "EVA gave it no rank: its inputs vary in fewer directions than those of other layers"

    def skip(self, site: Site, **facts: object) -> Skipped:
        """Return the decision to leave ``site`` alone, with the facts in its reason."""
        return Skipped(site, self, self.value.format(**facts))


@dataclass(frozen=True, slots=True)
class Attached:
    """One site the plan adapts.

    Attributes:
        via: the PEFT field that reaches it, "target_modules" or "target_parameters".
        target: which of the user's targets names it.
        reason: how it matches that target, for people to read.
    """

    site: Site
    via: str
    target: str
    reason: str

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def target_path(self) -> str:
        """The path that PEFT matches: the module's, or the parameter's for a site in ``target_parameters``."""
        by_parameter = self.via == "target_parameters" and self.site.kind != "parameter"
        return f"{self.path}.weight" if by_parameter else self.path

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.site.path,
            "tower": self.site.tower,
            "role": self.site.role,
            "via": self.via,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """One site the plan leaves alone, and why: as an enum for programs, as a sentence for people."""

    site: Site
    cause: LeftAlone
    reason: str

    @property
    def path(self) -> str:
        return self.site.path

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.site.path, "reason": self.reason}


class Shortfall(Enum):
    """Why a target reaches nothing. The value is the reason that people read, with blanks for the facts."""

    ABSENT = "the model has no such weights in {scope}"
    ROLE_UNCLEAR = "no weight in {scope} is known to be that; what {names} do is not known"
    STACKED_EXPERTS = "its MLPs are stacked experts, which 'experts' names"
    OUT_OF_SCOPE = "only in {towers}, outside the scope"
    NOT_ADAPTABLE = "no adapter can go on its {count} weights: {reasons}"
    NOT_BY_METHOD = "{method} cannot adapt its {count} weights: {reasons}"
    NO_GRADIENT = "nothing would train its {count} weights: {reasons}"

    def of(self, target: str, sites: Sequence[Site] = (), **facts: object) -> Unmet:
        """Return the finding that ``target`` is not met, with the facts in its reason."""
        return Unmet(
            target, self, self.value.format(count=len(sites), **facts), tuple(site.path for site in sites)
        )


@dataclass(frozen=True, slots=True)
class Unmet:
    """One of the user's targets that adapts nothing, and why.

    Attributes:
        target: as the user wrote it.
        reason: the cause as a sentence for people.
        sites: the paths of the weights that it means and that cannot be adapted; ``Plan.skipped`` has why each.
    """

    target: str
    cause: Shortfall
    reason: str
    sites: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the model has weights that the target means, in scope."""
        return bool(self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "cause": self.cause.name.lower(),
            "reason": self.reason,
            "sites": list(self.sites),
        }


class Caution(Enum):
    """What a plan does as asked and warns of. The value is the warning that people read, with blanks for facts."""

    NO_GRADIENT = "adapted because {target} names it, although no gradient reaches it: {cause}"
    TIED = (
        "adapted because {target} names it: its weight is that of {other} too, where the adapter has no effect, "
        "and a merge would change both (graft merge --tied untie keeps them apart)"
    )
    FAULT = "{says}; see {page}"
    HEAD_NOT_SAVED = (
        "its weight is not in the adapter's file: if from_pretrained initialized it, as its report then says, "
        "nobody has it who loads the adapter; modules_to_save=[{name!r}] trains and saves it"
    )

    def about(self, sites: Sequence[str], *, page: str | None = None, **facts: object) -> PlanWarning:
        """Return the warning about these sites, with the facts in its message."""
        return PlanWarning(self, tuple(sites), self.value.format(page=page, **facts), page)


@dataclass(frozen=True, slots=True)
class PlanWarning:
    """Something that a plan does as asked, and that will not do what one expects.

    Attributes:
        sites: the paths of the weights that it is about.
        message: the caution as a sentence for people.
        page: of graftkit's repository, where one reports the fault behind it.
    """

    caution: Caution
    sites: tuple[str, ...]
    message: str
    page: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "caution": self.caution.name.lower(),
            "sites": list(self.sites),
            "message": self.message,
            "page": self.page,
        }


def is_tied_to_linears(site: Site, model_map: ModelMap) -> bool:
    """Check whether a linear shares its weight with linears alone, in modules that each compute with it.

    An adapter on one of them can be trained and served, if not merged: it is part of that module. An embedding and
    a head that share a weight are left to PEFT's own means.
    """
    return site.is_linear and bool(site.tied_to) and all(model_map[path].is_linear for path in site.tied_to)


def objection_to(site: Site) -> Skipped | None:
    """Return why no adapter goes on this site even when it is asked for, or None."""
    if not site.adaptable:
        return LeftAlone.NOT_ADAPTABLE.skip(site, reason=site.reason)
    return LeftAlone.TIED.skip(site, other=site.tied_to[0]) if site.tied_to else None
