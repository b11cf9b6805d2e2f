"""Rewards for GRPO: built-in ones that verify an answer, and the user's, by import path."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from graftkit.errors import DataError
from graftkit.text import describe, suggest

Reward = Callable[..., list[float]]
# A hyphen after a digit or a letter is not a sign; commas separate thousands.
_NUMBER = re.compile(r"(?<!\w)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 where the completion, without surrounding spaces, is the row's ``answer``, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(_text(given).strip() == str(right).strip()) for given, right in pairs]


def number_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 where the completion's last number equals the row's ``answer``, a number or its text, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(_last_number(_text(given)) == _number(right)) for given, right in pairs]


_BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "number_match": number_match}


def load_rewards(names: str | Sequence[str] | None, home: Path) -> list[Reward]:
    """Return a recipe's reward functions.

    Args:
        names: built-in names, or ``module:function``, importable or beside the recipe.
        home: the recipe's folder.

    Raises:
        DataError: ``reward``: none is named, or one cannot be found.
    """
    return [_BUILT_IN.get(name) or _imported(name, home) for name in check_rewards(names, home)]


def check_rewards(names: str | Sequence[str] | None, home: Path) -> list[str]:
    """Return the names of a recipe's rewards, each a built-in one or in a module that is there.

    The user's module is not imported. Arguments and errors as in :func:`load_rewards`.
    """
    listed = [names] if isinstance(names, str) else list(names or ())
    if not listed:
        raise DataError(
            "grpo needs a reward",
            help=f"data: {{reward: {next(iter(_BUILT_IN))}}}, or module:function",
            code="reward",
        )
    for name in listed:
        module, colon, _ = name.partition(":")
        if name not in _BUILT_IN and not colon:
            raise DataError(
                f"no built-in reward {name!r}",
                help=suggest(name, _BUILT_IN) or f"one of {', '.join(_BUILT_IN)}, or module:function",
                code="reward",
            )
        package = module.partition(".")[0]
        if colon and package not in sys.modules and PathFinder.find_spec(package, [str(home), *sys.path]) is None:
            raise _not_imported(name, f"there is no module {package} beside the recipe, and none is installed")
    return listed


def _imported(name: str, home: Path) -> Reward:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(home))
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may raise anything
        raise _not_imported(name, describe(error)) from error
    finally:
        sys.path.remove(str(home))
    if not callable(found):
        raise _not_imported(name, f"{function} is a {type(found).__name__}, which cannot be called")
    return found


def _not_imported(name: str, why: str) -> DataError:
    return DataError(f"the reward {name} cannot be imported", why=why, help="module:function", code="reward")


def _text(completion: Any) -> str:
    """Return the text of a completion: a string, or messages for a conversational prompt."""
    return completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return _number(found[-1]) if found else None


def _number(value: Any) -> float:
    """Return the number, or NaN, which equals nothing."""
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return math.nan
