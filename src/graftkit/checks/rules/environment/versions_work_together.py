"""The installed versions must not be a combination that is known to fail.

## Why it matters

Some versions cannot be imported together; others run and compute something else.

## Example

A model whose layers share keys and values, on a transformers that needs the cache for that.

## How safe that is

Changing one package may change others: `pip install` says which, before it does.

## Sources

"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.families import family_of
from graftkit.findings import Severity, Source


@dataclass(frozen=True)
class Combination:
    """Versions that do not work together.

    Attributes:
        versions: package -> PEP 440 specifier; all of them must match.
        why: what goes wrong.
        instead: the nearest working version, as an argument of pip.
        source: the thread or code that shows it.
    """

    versions: Mapping[str, str]
    why: str
    instead: str
    source: str


COMBINATIONS = (
    Combination(
        {"peft": ">=0.19.0,<0.19.1", "torch": "<2.7"},
        "get_peft_model raises: torch has no float8_e8m0fnu",
        "torch>=2.7",
        "https://github.com/huggingface/peft/issues/3158",
    ),
    Combination(
        {"transformers": "==5.10.2", "torch": "<2.7"},
        "importing a model raises: torch has no float8_e8m0fnu",
        "torch>=2.7",
        "https://github.com/huggingface/transformers/issues/46515",
    ),
    Combination(
        {"peft": ">=0.18.0", "transformers": "<4.52.1"},
        "importing peft raises: there is no transformers.modeling_layers",
        "transformers>=4.52.1",
        "https://github.com/langfengQ/verl-agent/pull/207",
    ),
    Combination(
        {"peft": "<0.18.0", "transformers": ">=5.0.0"},
        "importing peft raises: transformers has no HybridCache",
        "peft>=0.18.0",
        "https://github.com/jtydhr88/ComfyUI-See-through/pull/24",
    ),
)


def _check(context: CheckContext) -> Observation:
    try:
        met = [c for c in (*COMBINATIONS, *_of_the_model(context)) if _met(c, context.environment)]
    except InvalidVersion as error:
        return unknown(f"a version cannot be read: {error}")
    if not met:
        return passed("no combination of versions that is known to fail", known=len(COMBINATIONS))
    first = met[0]
    versions = ", ".join(f"{package} {context.environment[package]}" for package in first.versions)
    return failed(
        f"{versions}: {first.why}",
        where=next(iter(first.versions)),
        help=f"pip install '{first.instead}'; see {first.source}",
        combinations=len(met),
    )


def _of_the_model(context: CheckContext) -> Iterable[Combination]:
    """Yield the versions that the model's family does not work with."""
    model_type = (context.given.config or {}).get("model_type")
    family = family_of(model_type) if isinstance(model_type, str) else None
    for need in family.requires if family is not None else ():
        wrong = ",".join(_opposite(part) for part in need.versions.split(","))
        yield Combination({need.package: wrong}, need.reason, f"{need.package}{need.versions}", need.source)


def _opposite(specifier: str) -> str:
    """Return the opposite of a minimum version: ">=5.5.2" -> "<5.5.2"."""
    if not specifier.startswith(">="):
        raise ValueError(f"{specifier!r} is not a minimum version")
    return f"<{specifier.removeprefix('>=')}"


def _met(combination: Combination, environment: Mapping[str, str | None]) -> bool:
    installed = {package: environment.get(package) for package in combination.versions}
    return all(
        version is not None
        and SpecifierSet(combination.versions[package]).contains(Version(version), prereleases=True)
        for package, version in installed.items()
    )


RULE = Rule(
    code="GK002",
    title="the installed versions are not a combination that is known to fail",
    severity=Severity.ERROR,
    needs=("environment",),
    check=_check,
    help="install the nearest versions that work",
    doc=(__doc__ or "") + "".join(f"- {combination.source}\n" for combination in COMBINATIONS),
    since="0.1.0",
    source=Source.VERSIONS,
)
