"""Regular expressions of a configuration that cannot be read, or that would keep PEFT busy for ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from graftkit.planning.matching import KEY_FORM, LONGEST_NAME, SAVED_FORM
from graftkit.text import quoted

_REPEATS = re.compile(r"[*+{]")
# All of a configuration's expressions together take milliseconds on the largest models.
_PATIENCE = 10
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for at, pattern in enumerate(patterns):
    print(at, flush=True)
    match = re.compile(pattern).match
    for name in names:
        match(name)
"""


def pattern_problems(config: Mapping[str, Any], paths: Iterable[str]) -> Iterable[str]:
    """Regular expressions that cannot be read, or that would keep PEFT busy for ever."""
    patterns = [item for item in _patterns(config) if not re.fullmatch(r"[\w.]+", item[1])]
    for field, given, form in patterns:
        try:
            re.compile(form.format(given) if form else given)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{field} holds {quoted(given)}, which is no regular expression: {error}"
            return
    forms = [form.format(given) if form else given for _, given, form in patterns]
    # One repetition alone is at most quadratic.
    looping = [at for at, form in enumerate(forms) if len(_REPEATS.findall(form)) > 1]
    endless = _endless([forms[at] for at in looping], paths) if looping else None
    if endless is not None:
        field, given, _ = patterns[looping[endless]]
        yield f"{field} holds {quoted(given)}, which does not finish on the module names in {_PATIENCE} s"


def _patterns(config: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Every string of the configuration that PEFT runs as a regular expression, and the form it puts it in.

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
    """Which regular expression does not finish on these names: tried in a process that can be ended."""
    names = [path for path in paths if len(path) <= LONGEST_NAME]
    # PEFT matches whole names; a match that may stop early would hide how long a refusal takes.
    given = json.dumps(([f"(?:{pattern})\\Z" for pattern in patterns], names)).encode()
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(command, input=given, timeout=_PATIENCE, check=True, capture_output=True)
    except subprocess.TimeoutExpired as slow:
        return int((slow.stdout or b"0").split()[-1])
    return None
