"""Experts stacked in one parameter must not be left out by names of modules.

## Why it matters

Stacked experts are one parameter each, which a list of module names never reaches: most of the model stays as
it is, though the loss goes down.

## Example

The usual seven names, or "all-linear", on a mixture of experts that PEFT does not rewrite: `gate_proj` names
nothing, or only a shared MLP beside the experts.

## How safe that is

It adds a pair of matrices an expert, which takes memory, and rules out dropout, DoRA and initializers that read
the weights. Not every serving engine reads such adapters.

## Sources

- https://github.com/huggingface/peft/issues/3009
- peft: utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
"""

from __future__ import annotations

import re
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.checks.peft_config.fixes import more_parameters, recipe_key
from graftkit.checks.peft_config.raw import RefusalKind
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.findings import Severity, Source
from graftkit.surveying.roles.by_name import role_of
from graftkit.text import percent


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    experts = [site for site in resolved.base if site.role == "expert" and site.kind == "parameter"]
    missed = [site for site in experts if site.path not in resolved.adapted]
    if resolved.refusal(RefusalKind.FUSED) is not None:
        return unknown("PEFT refuses the fused names before it reaches the experts")
    if not missed:
        return passed(f"all {len(experts)} expert parameters are adapted" if experts else "there are none")
    share = sum(site.params for site in missed) / max(resolved.base.model.params, 1)
    figures: dict[str, Any] = {"experts": len(experts), "missed": len(missed), "share": round(share, 4)}
    weights = f"{percent(share)} of the model's weights"
    if context.given.plan is not None or not _asked(resolved):
        message = f"{len(missed)} expert parameters, {weights}, are not adapted, and none was asked for"
        return info(message, where=missed[0].path, help="target_parameters adapts them", **figures)
    paths = [site.path for site in missed]
    return failed(
        f"the targets leave out {len(missed)} of {len(experts)} expert parameters, {weights}: they are stacked"
        " parameters, and the targets name modules",
        where=missed[0].path,
        fix=more_parameters(context, paths),
        key=recipe_key(context, "target_modules"),
        **figures,
    )


def _asked(resolved: ResolvedTargets) -> bool:
    """Check whether the targets name what experts consist of: "all-linear", or a part of an MLP."""
    if resolved.is_all_linear:
        return True
    targets = (resolved.targets,) if isinstance(resolved.targets, str) else resolved.targets or ()
    parts = {site.path.rpartition(".")[2] for site in resolved.base if site.role == "expert"}
    words = set(re.findall(r"\w+", " ".join(targets)))
    return any(word in parts or role_of((word,), "linear").startswith("mlp.") for word in words)


RULE = Rule(
    code="GK103",
    title="no experts are left out by targets that name MLP layers",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="add the experts to target_parameters; a plan with `targets: [all-linear, experts]` writes them",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
