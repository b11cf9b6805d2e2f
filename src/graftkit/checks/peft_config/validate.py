"""What is wrong with a configuration's own fields, whatever the model: their kinds, and what has no end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

from graftkit.checks.peft_config.field_kinds import wrong_kinds
from graftkit.checks.peft_config.regex_limits import pattern_problems
from graftkit.text import quoted

# Beyond this many comparisons of a pattern's key with a module, the answer would take minutes.
_MOST_COMPARISONS = 20_000_000
_LEAST_MODULES = 2_000
_Fields = dict[str, tuple[str, Callable[[Any], bool]]]


def config_problems(
    config: Mapping[str, Any], peft_type: str, paths: Iterable[str], *, modules: int = 0
) -> tuple[str, ...]:
    """What is wrong with a configuration's own fields: their types, and patterns or lists that have no end.

    Args:
        config: the fields, as adapter_config.json has them.
        peft_type: the method, as PEFT spells it.
        paths: the module paths that its patterns will be matched with.
        modules: how many modules there are at the least.
    """
    # What only LoRA wants: others give these fields a meaning of their own (OFT's r may be 0).
    fields = _FIELDS | (_LORA_FIELDS if peft_type == "LORA" else {})
    found = [
        f"{name} is {quoted(config[name])}, not {expected}"
        for name, (expected, fits) in fields.items()
        if name in config and not fits(config[name])
    ]
    found += [wrong for wrong in wrong_kinds(config, peft_type) if wrong.partition(" ")[0] not in fields]
    # The first fault is enough: each trial of a pattern may take its whole time.
    faults = chain(_too_many(config, max(modules, _LEAST_MODULES)), pattern_problems(config, paths))
    return tuple(found) or tuple(islice(faults, 1))


def _too_many(config: Mapping[str, Any], modules: int) -> Iterable[str]:
    """Lists that PEFT compares with every module, and that are longer than any model needs."""
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save", "layers_pattern"):
        entries = config.get(name) or ()
        if not isinstance(entries, str) and len(entries) * modules > _MOST_COMPARISONS:
            yield f"{name} has {len(entries)} entries, more than any model needs"


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(rank) and rank > 0 for rank in value.values())


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


# Field -> what PEFT expects there. Source: peft.LoraConfig, whose names the other methods share.
_FIELDS: _Fields = {
    "r": ("a whole number", lambda v: v is None or _whole(v)),
    "target_modules": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "exclude_modules": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "modules_to_save": ("a list of strings", lambda v: v is None or _strings(v)),
    "target_parameters": ("a list of strings", lambda v: v is None or _strings(v)),
    "layers_pattern": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda v: v is None or _whole(v) or (isinstance(v, list) and all(map(_whole, v))),
    ),
    "rank_pattern": ("an object", lambda v: v is None or isinstance(v, dict)),
    "alpha_pattern": ("an object", lambda v: v is None or isinstance(v, dict)),
}

_LORA_FIELDS: _Fields = {
    "r": ("a positive whole number", lambda v: _whole(v) and v > 0),
    "lora_alpha": ("a number", _number),
    "rank_pattern": ("an object of positive whole numbers", lambda v: v is None or _ranks(v)),
    "alpha_pattern": ("an object of numbers", lambda v: v is None or _numbers(v)),
}
