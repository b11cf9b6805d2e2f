"""One site of a plan, with everything that is known about it and why the plan treats it as it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.surveying.sites import Site
from graftkit.text import count, some, suggest

if TYPE_CHECKING:
    from graftkit.planning.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """What the plan does with one site.

    Attributes:
        decision: "adapted" or "left alone".
        via: the PEFT field that reaches it, or None.
        reason: why it is adapted, or why not.
        warning: what the plan warns of about it, or None.
    """

    site: Site
    decision: str
    via: str | None
    reason: str
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site.to_dict(),
            "decision": self.decision,
            "via": self.via,
            "reason": self.reason,
            "warning": self.warning,
        }

    def __str__(self) -> str:
        site = self.site
        lines = [
            site.path,
            f"  {self.decision}: {self.reason}" + (f" (through {self.via})" if self.via else ""),
            f"  tower {site.tower}, role {site.role}, {site.kind} of {' x '.join(map(str, site.shape))}, "
            f"{count(site.params)} weights",
        ]
        facts = (
            ("wrapper", f"{site.wrapper.cls} at {site.wrapper.path}" if site.wrapper else None),
            ("tied to", ", ".join(site.tied_to)),
            ("warning", self.warning),
            ("quantized by", site.quantized),
            ("note", site.note),
            ("on disk", some(site.checkpoint_keys)),
        )
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in facts if value)])


def explain(plan: Plan, path: str) -> Explanation:
    """Explain the site at ``path``: its own path, or that of the wrapper around it.

    Raises:
        PlanError: ``site-unknown``, with the nearest paths.
    """
    try:
        site = plan.model[path]
    except KeyError:
        raise PlanError(
            f"this model has no site {path!r}",
            where=plan.model.model.name,
            why=f"it has {len(plan.model.sites)} sites, and none at that path",
            help=suggest(path, [site.path for site in plan.model], 2) or "graft survey --json lists every path",
            code="site-unknown",
        ) from None
    for attached in plan.attached:
        if attached.path == site.path:
            warnings = [warning.message for warning in plan.warnings if site.path in warning.sites]
            return Explanation(site, "adapted", attached.via, attached.reason, "; ".join(warnings) or None)
    reason = next(skipped.reason for skipped in plan.skipped if skipped.path == site.path)
    return Explanation(site, "left alone", None, reason)
