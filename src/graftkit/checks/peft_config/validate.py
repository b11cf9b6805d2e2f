"""Problems in a configuration's own fields: wrong types, and patterns or lists that would keep PEFT busy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

from graftkit.checks.peft_config.schema import wrong_kinds
from graftkit.planning.matching import KEY_FORM, LONGEST_NAME, SAVED_FORM
from graftkit.text import quoted

# More comparisons of a pattern's key with a module would take minutes.
_MOST_COMPARISONS = 20_000_000
_LEAST_MODULES = 2_000
_REPEATS = re.compile(r"[*+{]")
# Seconds; the patterns of real configurations take milliseconds together, on the largest models.
_TIMEOUT = 10
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for at, pattern in enumerate(patterns):
    print(at, flush=True)
    match = re.compile(pattern).match
    for name in names:
        match(name)
"""
_Fields = dict[str, tuple[str, Callable[[Any], bool]]]


def config_problems(
    config: Mapping[str, Any], peft_type: str, paths: Iterable[str], *, modules: int = 0
) -> tuple[str, ...]:
    """Return what is wrong with a configuration's own fields; empty where they can be used.

    Args:
        config: the fields, as adapter_config.json has them.
        peft_type: the method, in capitals.
        paths: the module paths that its patterns will be matched with.
        modules: how many modules the model has, at least.
    """
    # Other methods give LoRA's fields other meanings: OFT's r may be 0.
    fields = _FIELDS | (_LORA_FIELDS if peft_type == "LORA" else {})
    found = [
        f"{name} is {quoted(config[name])}, not {expected}"
        for name, (expected, fits) in fields.items()
        if name in config and not fits(config[name])
    ]
    found += [problem for name, problem in wrong_kinds(config, peft_type).items() if name not in fields]
    # The first is enough: each trial of a pattern may take the whole timeout.
    faults = chain(_too_many(config, max(modules, _LEAST_MODULES)), _pattern_problems(config, paths))
    return tuple(found) or tuple(islice(faults, 1))


def _too_many(config: Mapping[str, Any], modules: int) -> Iterable[str]:
    """Yield the lists that PEFT compares with every module and that are longer than any model needs."""
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save", "layers_pattern"):
        entries = config.get(name) or ()
        if not isinstance(entries, str) and len(entries) * modules > _MOST_COMPARISONS:
            yield f"{name} has {len(entries)} entries, more than any model needs"


def _pattern_problems(config: Mapping[str, Any], paths: Iterable[str]) -> Iterable[str]:
    """Yield regular expressions that cannot be compiled, or that do not finish on the module names."""
    patterns = [item for item in _patterns(config) if not re.fullmatch(r"[\w.]+", item[1])]
    for field, given, form in patterns:
        try:
            re.compile(form.format(given) if form else given)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{field} holds {quoted(given)}, which is not a valid regular expression: {error}"
            return
    forms = [form.format(given) if form else given for _, given, form in patterns]
    # One repetition alone is at most quadratic.
    looping = [at for at, form in enumerate(forms) if len(_REPEATS.findall(form)) > 1]
    endless = _endless([forms[at] for at in looping], paths) if looping else None
    if endless is not None:
        field, given, _ = patterns[looping[endless]]
        yield f"{field} holds {quoted(given)}, which does not finish on the module names in {_TIMEOUT} s"


def _patterns(config: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield (field, string, form) for each string that PEFT runs as a regular expression, inserted in a form.

    Sources: ``peft.tuners.tuners_utils.check_target_module_exists``, ``peft.utils.other.get_pattern_key``.
    """
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            yield name, config[name], ""
    for name in ("rank_pattern", "alpha_pattern"):
        yield from ((name, key, KEY_FORM) for key in config.get(name) or ())
    yield from (("modules_to_save", key, SAVED_FORM) for key in config.get("modules_to_save") or ())
    layers = config.get("layers_pattern") or ()
    for key in (layers,) if isinstance(layers, str) else layers:
        yield "layers_pattern", key, r"(?:^|.*?\.){}\.(\d+)\."


def _endless(patterns: list[str], paths: Iterable[str]) -> int | None:
    """Return the index of a pattern that does not finish on these names; tried in a process that can be killed."""
    names = [path for path in paths if len(path) <= LONGEST_NAME]
    # PEFT matches whole names; a match that may stop early would hide how long a refusal takes.
    given = json.dumps(([f"(?:{pattern})\\Z" for pattern in patterns], names)).encode()
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(command, input=given, timeout=_TIMEOUT, check=True, capture_output=True)
    except subprocess.TimeoutExpired as slow:
        return int((slow.stdout or b"0").split()[-1])
    return None


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) <= sys.float_info.max


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(rank) and rank > 0 for rank in value.values())


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


# Field -> what PEFT expects in it. Source: peft.LoraConfig, whose field names the other methods share.
_FIELDS: _Fields = {
    "peft_type": ("a method's name in capitals", lambda v: isinstance(v, str) and v.isupper()),
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
    "peft_type": ("a method's name in capitals", lambda v: isinstance(v, str) and v.isupper()),
    "r": ("a positive whole number", lambda v: _whole(v) and v > 0),
    "lora_alpha": ("a number", _number),
    "rank_pattern": ("an object of positive whole numbers", lambda v: v is None or _ranks(v)),
    "alpha_pattern": ("an object of numbers", lambda v: v is None or _numbers(v)),
}
