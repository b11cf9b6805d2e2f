"""What serves adapters, and what each engine does with their files."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace
from functools import cache

from packaging.version import InvalidVersion, Version

from graftkit.engines import facts
from graftkit.engines.base import Engine, Fact, Feature, Model, Remedy, Stance
from graftkit.errors import EngineError
from graftkit.text import suggest

__all__ = ["Engine", "Fact", "Feature", "Model", "Remedy", "Stance", "all_engines", "engine_named"]


@cache
def all_engines() -> tuple[Engine, ...]:
    """Return every engine in its newest known version, by name."""
    names = [name for _, name, _ in pkgutil.iter_modules(facts.__path__) if not name.startswith("_")]
    engines = [importlib.import_module(f"{facts.__name__}.{name}").ENGINE for name in names]
    return tuple(sorted(engines, key=lambda engine: engine.name))


def engine_named(text: str) -> Engine:
    """Return the engine a user means: "vllm", or "vllm==0.32" for a version other than the newest known.

    Raises:
        EngineError: ``engine-unknown``, or ``engine-version`` where what follows "==" is not a version.
    """
    name, _, version = (part.strip() for part in text.partition("=="))
    engine = next((e for e in all_engines() if _plain(name) in {_plain(e.name), _plain(e.title)}), None)
    if engine is None:
        names = [engine.name for engine in all_engines()]
        raise EngineError(
            f"no engine is called {name!r:.80}",
            where=f"{text!r:.80}",
            why=f"the known engines are {', '.join(names)}",
            help=suggest(_plain(name), names) or f"name one of them, as {names[-1]} or {names[-1]}==VERSION",
            code="engine-unknown",
        )
    if not version:
        return engine
    try:
        return replace(engine, version=Version(_number(version)))
    except InvalidVersion:
        raise EngineError(
            f"{version!r:.80} is not a version",
            where=f"{text!r:.80}",
            why=f"what follows == is the number of a release of {engine.title}",
            help=f"{engine.name}=={engine.version or '1.0'}, or {engine.name} for the newest known",
            code="engine-version",
        ) from None


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name).lower()


def _number(version: str) -> str:
    """Return a version as packaging reads it. Some engines count builds: b6500."""
    return version[1:] if re.fullmatch(r"b\d+", version) else version
