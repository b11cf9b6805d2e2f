"""A survey or a plan as the data of a report page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.report.data import Figure, ReportData, SiteCell, SiteState, TowerMap
from graftkit.text import count, percent

if TYPE_CHECKING:
    from graftkit.planning.plan import Plan
    from graftkit.surveying.sites import ModelMap, Site


def survey_page(model_map: ModelMap, command: str) -> ReportData:
    """Return the page of a survey: the model as a picture, every weight with why it cannot be adapted."""
    info = model_map.model
    able = sum(_possible(site) for site in model_map)
    wrapped = sum(site.wrapper is not None for site in model_map)
    return ReportData(
        title=f"Survey of {info.name}",
        subtitle=f"{info.cls}, {count(info.params)} parameters, read from {info.origin}",
        figures_title="Where an adapter can go",
        figures=[
            {"label": "weights", "value": str(len(model_map))},
            _figure("can be adapted", able, model_map),
            _figure("inside a wrapper", wrapped, model_map),
        ],
        towers=towers_of(model_map),
        command=command,
    )


def plan_page(plan: Plan, command: str) -> ReportData:
    """Return the page of a plan: the model as a picture of what is adapted, what is not, and why."""
    info = plan.model.model
    return ReportData(
        title=f"Plan for {info.name}",
        subtitle=f"{plan.method} on {', '.join(plan.targets)} in {', '.join(plan.scope)}",
        figures_title="What would be trained",
        figures=[
            _figure("weights adapted", len(plan.attached), plan.model),
            {
                "label": "trained parameters",
                "value": count(plan.trainable_params),
                "note": f"{percent(plan.trainable_params / max(info.params, 1))} of the model",
            },
            *_passed_over(plan),
        ],
        towers=towers_of(plan.model, plan),
        command=command,
    )


def towers_of(model_map: ModelMap, plan: Plan | None = None) -> list[TowerMap]:
    """Return the model as towers of cells; with a plan, its adapted sites and its reasons for the others."""
    adapted = {a.path for a in plan.attached} if plan else set()
    reasons = {s.path: s.reason for s in plan.skipped} if plan else {}
    return [
        {
            "name": tower.name,
            "sites": [_cell(site, adapted, reasons) for site in model_map if site.tower == tower.name],
        }
        for tower in model_map.towers
        if tower.sites
    ]


def _passed_over(plan: Plan) -> list[Figure]:
    return [{"label": f"{unmet.target}, passed over", "value": "0", "note": unmet.reason} for unmet in plan.unmet]


def _figure(label: str, number: int, model_map: ModelMap) -> Figure:
    return {"label": label, "value": str(number), "share": number / max(len(model_map), 1)}


def _cell(site: Site, adapted: set[str], reasons: dict[str, str]) -> SiteCell:
    state: SiteState = "adapted" if site.path in adapted else "possible" if _possible(site) else "impossible"
    reason = "" if state == "adapted" else reasons.get(site.path) or site.reason or ""
    return {"path": site.path, "state": state, "params": site.params, "reason": reason}


def _possible(site: Site) -> bool:
    return site.adaptable and not site.tied_to
