"""The rank and the scale of a saved LoRA's modules, from the fields of a configuration that may have been edited.

Source: ``peft.tuners.lora.model.LoraModel._create_and_replace``, ``peft.tuners.lora.LoraLayer.update_layer``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, DEFAULT_ALPHA, DEFAULT_RANK
from graftkit.errors import AdapterError
from graftkit.planning.matching import value_at
from graftkit.text import quoted


def rank_at(config: Mapping[str, Any], module: str) -> int:
    """Return a module's rank.

    Raises:
        AdapterError: ``adapter-config``: it is not a positive whole number.
    """
    rank = _value_at(config, "r", DEFAULT_RANK, "rank_pattern", module)
    if type(rank) is not int or not 0 < rank <= sys.maxsize:
        raise _unusable("the rank", rank, "a positive whole number")
    return rank


def scale_at(config: Mapping[str, Any], module: str) -> float:
    """Return what a module's update is multiplied by: alpha over the rank, or over its root for rsLoRA.

    Raises:
        AdapterError: ``adapter-config``: alpha or the rank is not a number that it can be.
    """
    alpha = _value_at(config, "lora_alpha", DEFAULT_ALPHA, "alpha_pattern", module)
    _check_alpha(alpha)
    rank = rank_at(config, module)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_scales(config: Mapping[str, Any]) -> None:
    """Check that every alpha of a configuration that PEFT has read is finite: PEFT takes others.

    Raises:
        AdapterError: ``adapter-config``.
    """
    for alpha in (config.get("lora_alpha", DEFAULT_ALPHA), *(config.get("alpha_pattern") or {}).values()):
        _check_alpha(alpha)


def _check_alpha(alpha: object) -> None:
    if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise _unusable("alpha", alpha, "a finite number")


def _value_at(config: Mapping[str, Any], name: str, default: int, pattern: str, module: str) -> Any:
    given = config.get(pattern)
    if given is not None and not isinstance(given, Mapping):
        raise _unusable(pattern, given, "an object")
    return value_at(given, module, config.get(name, default))


def _unusable(what: str, value: object, expected: str) -> AdapterError:
    return AdapterError(
        f"the adapter's configuration cannot be used: {what} is not {expected}",
        where=CONFIG_NAME,
        why=f"it is {quoted(value)}",
        help="restore the adapter_config.json that was saved with these tensors",
        code="adapter-config",
    )
