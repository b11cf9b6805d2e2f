"""The further fields of PEFT's configuration that a plan takes, and those that it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from graftkit.errors import PlanError
from graftkit.planning.config.methods import Method
from graftkit.planning.initializers import initializer_of
from graftkit.text import suggest

# Fields that the plan decides, and what to write instead.
_DECIDED: Mapping[str, str] = {
    "target_modules": "use targets",
    "target_parameters": "use targets",
    "exclude_modules": "use targets and scope: the plan adapts exactly what they name",
    "layers_to_transform": "use targets: a regular expression names layers",
    "layers_pattern": "use targets: a regular expression names layers",
    "feedforward_modules": "leave it out; it follows from targets",
    "task_type": "leave it out; it follows from the model's class",
    "peft_type": "use method",
    "layer_replication": "replicate the layers first, then plan for the model that results",
}
# What people write for an argument that has another name.
_SYNONYMS: Mapping[str, str] = {
    "rank": "use r",
    "lora_r": "use r",
    "lora_rank": "use r",
    "lora_alpha": "use alpha",
    "lora_dropout": "use dropout",
    "options": "write each field as an argument: gk.plan(model, use_rslora=True); a recipe has options",
    "kwargs": "write each field as an argument: gk.plan(model, use_rslora=True)",
}


def instead_of(name: str) -> str | None:
    """Return what to write instead of an option that a plan decides or calls otherwise; None for any other."""
    return _DECIDED.get(name) or _SYNONYMS.get(name)


def check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Refuse an option that the plan decides, or that the method's configuration does not have.

    Raises:
        PlanError: ``option-decided`` or ``option-unknown``.
    """
    own = {method.alpha_field: "use alpha", method.dropout_field: "use dropout"}
    known = [f.name for f in dataclasses.fields(method.config_class) if f.init]
    for name in options:
        if (advice := _DECIDED.get(name) or own.get(name)) is not None:
            raise PlanError(f"{name} is decided by the plan", help=advice, code="option-decided")
        if name not in known:
            raise PlanError(
                f"unknown option {name!r}",
                where=name,
                why=f"{method.config_class.__name__} of PEFT has no such field",
                help=instead_of(name) or suggest(name, known) or "see the options of this class in PEFT",
                code="option-unknown",
            )
        if name == "rank_pattern" and "target_r" in method.defaults:
            raise PlanError(
                f"{method.name} writes rank_pattern itself, while it trains",
                help="leave it out; r sets the average rank that is kept",
                code="option-decided",
            )


# What PEFT's ParamWrapper refuses, and what it would do wrongly: initializers that read the module's own weight.
_NOT_ON_PARAMETERS = (
    ("use_dora", "DoRA"),
    ("lora_bias", "lora_bias"),
    ("fan_in_fan_out", "fan_in_fan_out"),
    ("lora_dropout", "dropout"),
    ("velora_config", "velora_config"),
    ("kasa_config", "kasa_config"),
    ("monteclora_config", "monteclora_config"),
    ("use_bdlora", "use_bdlora"),
    ("use_qalora", "use_qalora"),
    ("alora_invocation_tokens", "alora_invocation_tokens"),
)


def not_on_parameters(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields among ``options`` that PEFT cannot apply to a bare parameter, each with a name for it.

    Source: ``peft.tuners.lora.layer.ParamWrapper``.
    """
    named = {key: label for key, label in _NOT_ON_PARAMETERS if options.get(key)}
    init = options.get("init_lora_weights")
    row = initializer_of(init)
    if isinstance(init, str) and not (row and row.any_kind):
        named["init_lora_weights"] = f"init_lora_weights={init!r}"
    return named


def check_parameter_options(chosen: Mapping[str, Any], parameter: str) -> None:
    """Refuse what PEFT's ParamWrapper would refuse, before a model is touched.

    Raises:
        PlanError: ``expert-option``.
    """
    named = not_on_parameters(chosen).values()
    if named:
        raise PlanError(
            f"{' and '.join(named)} cannot be used on a bare parameter",
            where=parameter,
            why="PEFT adapts a parameter by adding to it, not by running an input through the adapter",
            help=f"drop {', '.join(named)}, or leave the experts out of the targets",
            code="expert-option",
        )
