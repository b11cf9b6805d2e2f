"""Method names -> PEFT configuration classes and the options each takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError

if TYPE_CHECKING:
    from peft import LoraConfig

# Options the plan itself decides; passing them would contradict it.
_DECIDED = frozenset(
    {
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "peft_type",
        "r",
        "lora_alpha",
    }
)


@dataclass(frozen=True)
class Method:
    """A way to adapt a site.

    Attributes:
        name: what the user writes.
        options: the LoRA options it stands for.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "lora": Method("lora"),
    "dora": Method("dora", {"use_dora": True}),
    "rslora": Method("rslora", {"use_rslora": True}),
}


def method_named(name: str) -> Method:
    """The method by name.

    Raises:
        PlanError: ``method-unknown``.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    raise PlanError(
        f"unknown method {name!r}",
        why=f"methods are {', '.join(METHODS)}",
        help=f"did you mean {near[0]!r}?" if near else "method='lora'",
        code="method-unknown",
    )


def check_numbers(r: Any, alpha: Any, dropout: Any) -> None:
    """Refuse a rank, alpha or dropout that PEFT would accept late, or silently.

    Raises:
        PlanError: ``rank-invalid``, ``alpha-invalid`` or ``dropout-invalid``.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise PlanError(
            f"the rank must be a positive whole number, not {r!r}",
            why="a rank of 0 or less adapts nothing",
            help="r=16 is a usual choice",
            code="rank-invalid",
        )
    if alpha is not None and (not isinstance(alpha, int | float) or alpha <= 0):
        raise PlanError(f"alpha must be positive, not {alpha!r}", help="alpha=r scales by 1", code="alpha-invalid")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise PlanError(f"dropout must lie in [0, 1), not {dropout!r}", help="dropout=0.0", code="dropout-invalid")


def build_config(
    method: Method,
    *,
    target_modules: str | list[str],
    target_parameters: list[str],
    task_type: str | None,
    r: int,
    alpha: float,
    dropout: float,
    options: Mapping[str, Any],
) -> LoraConfig:
    """The stock ``LoraConfig`` for one plan.

    Raises:
        PlanError: ``option-unknown``, ``option-decided``, ``expert-option`` (an option that PEFT cannot
            apply to a bare parameter), or ``option-invalid`` with PEFT's own message.
    """
    from peft import LoraConfig

    chosen = {**method.options, **options}
    _check_options(options, LoraConfig)
    if target_parameters:
        _check_parameter_options(chosen, dropout, target_parameters[0])
    try:
        return LoraConfig(
            task_type=task_type,
            target_modules=target_modules,
            target_parameters=target_parameters or None,
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            **chosen,
        )
    except (ValueError, TypeError) as error:
        raise PlanError(
            "PEFT refuses this combination of options",
            where="LoraConfig",
            why=str(error),
            help="change the option that the message names",
            code="option-invalid",
        ) from error


def _check_options(options: Mapping[str, Any], config_class: type) -> None:
    import dataclasses

    known = {f.name for f in dataclasses.fields(config_class)}
    for name in options:
        if name in _DECIDED:
            raise PlanError(
                f"{name} is decided by the plan",
                help="use targets, scope, r and alpha",
                code="option-decided",
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise PlanError(
                f"unknown option {name!r}",
                where=config_class.__name__,
                help=f"did you mean {near[0]!r}?" if near else "see the options of this class in PEFT",
                code="option-unknown",
            )


def _check_parameter_options(options: Mapping[str, Any], dropout: float, parameter: str) -> None:
    """What PEFT's ParamWrapper refuses, said before a model is touched (peft.tuners.lora.layer.ParamWrapper)."""
    refused = {"use_dora": "DoRA", "lora_bias": "lora_bias", "fan_in_fan_out": "fan_in_fan_out"}
    named = [label for key, label in refused.items() if options.get(key)]
    named += ["dropout"] if dropout else []
    if named:
        raise PlanError(
            f"{' and '.join(named)} cannot be used on a bare parameter",
            where=parameter,
            why="PEFT adapts a parameter by adding to it, not by running an input through the adapter",
            help=f"drop {', '.join(named)}, or leave the experts out of the targets",
            code="expert-option",
        )
