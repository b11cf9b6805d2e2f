"""graftkit: attach an adapter to any open model; know that it trains what you meant; ship it unchanged.

Importing this package imports neither torch nor transformers: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graftkit._version import __version__

if TYPE_CHECKING:
    from graftkit.adapters.migrate import migrate
    from graftkit.attaching.as_linear import as_linear
    from graftkit.attaching.attach import attach
    from graftkit.attaching.enable import disable, enable
    from graftkit.attaching.initialize import initialize
    from graftkit.attaching.unwrap import unwrap
    from graftkit.checks.check import check
    from graftkit.checks.doctor import doctor
    from graftkit.checks.verify import verify
    from graftkit.converting.convert import convert
    from graftkit.errors import GraftError
    from graftkit.findings import Finding, Report, Severity
    from graftkit.merging.merge import merge
    from graftkit.merging.rekey import rekey
    from graftkit.planning.plan import Plan, plan
    from graftkit.recipes.recipe import read_recipe
    from graftkit.serving.probe import probe
    from graftkit.serving.prove import prove
    from graftkit.serving.prove_merged import prove_merged
    from graftkit.serving.sign import sign
    from graftkit.surveying.sites import ModelMap, Site
    from graftkit.surveying.survey import survey
    from graftkit.training.guard.guard import Guard
    from graftkit.training.run import train
    from graftkit.twins.description import TwinDescription, describe_twin
    from graftkit.twins.example_batch import example_batch
    from graftkit.twins.twin import twin

__all__ = [
    "Finding",
    "GraftError",
    "Guard",
    "ModelMap",
    "Plan",
    "Report",
    "Severity",
    "Site",
    "TwinDescription",
    "__version__",
    "as_linear",
    "attach",
    "check",
    "convert",
    "describe_twin",
    "disable",
    "doctor",
    "enable",
    "example_batch",
    "initialize",
    "merge",
    "migrate",
    "plan",
    "probe",
    "prove",
    "prove_merged",
    "read_recipe",
    "rekey",
    "sign",
    "survey",
    "train",
    "twin",
    "unwrap",
    "verify",
]

_HOME = {
    "Finding": "findings",
    "GraftError": "errors",
    "Guard": "training.guard.guard",
    "ModelMap": "surveying.sites",
    "Plan": "planning.plan",
    "Report": "findings",
    "Severity": "findings",
    "Site": "surveying.sites",
    "TwinDescription": "twins.description",
    "as_linear": "attaching.as_linear",
    "attach": "attaching.attach",
    "check": "checks.check",
    "convert": "converting.convert",
    "describe_twin": "twins.description",
    "disable": "attaching.enable",
    "doctor": "checks.doctor",
    "enable": "attaching.enable",
    "example_batch": "twins.example_batch",
    "initialize": "attaching.initialize",
    "merge": "merging.merge",
    "migrate": "adapters.migrate",
    "plan": "planning.plan",
    "prove": "serving.prove",
    "prove_merged": "serving.prove_merged",
    "probe": "serving.probe",
    "read_recipe": "recipes.recipe",
    "rekey": "merging.rekey",
    "sign": "serving.sign",
    "survey": "surveying.survey",
    "train": "training.run",
    "twin": "twins.twin",
    "unwrap": "attaching.unwrap",
    "verify": "checks.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
