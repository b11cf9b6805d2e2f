"""From findings and errors to the outcome of a check."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.errors import AttachError, GraftError, PlanError
from graftkit.findings import Finding, Severity
from graftkit.matrix.cell import Outcome, Verdict
from graftkit.text import describe, printable

# What PEFT raises on purpose, where a method does not do what is asked.
DELIBERATE = (NotImplementedError, ValueError, TypeError)
# Errors that say what a method needs and this model does not have: a loss of its own.
_REFUSALS = frozenset({"initialize-loss"})
_LONGEST = 500


def guarded(check: Callable[[], Outcome]) -> Outcome:
    """Return the outcome of a check; an error that it raises is one too, and never lost."""
    try:
        return check()
    except GraftError as error:
        return of_error(error)
    except Exception as error:  # whatever a model, PEFT or a library runs into is what the matrix is for
        evidence = {"error": _class(error), **_place(error)}
        return Outcome(Verdict.FAILED, _short(describe(error)), ("unexpected",), evidence)


def of_error(error: GraftError) -> Outcome:
    """Return the outcome of an error that graftkit raised on purpose.

    A plan that is refused, a method that PEFT refuses on purpose, and one that needs what the model lacks, are
    refusals. What needs a package that is
    not installed is unknown. Anything else failed.
    """
    cause = error.__cause__
    by_peft = isinstance(error, AttachError) and isinstance(cause, DELIBERATE)
    refused = isinstance(error, PlanError) or by_peft or error.code in _REFUSALS
    verdict = Verdict.REFUSED if refused else Verdict.FAILED
    if isinstance(cause, ImportError):
        verdict = Verdict.UNKNOWN
    evidence = {} if cause is None else {"error": _class(cause)}
    message = _short(f"{error.what}: {error.why}" if error.why else error.what)
    return Outcome(verdict, message, (error.code,), evidence)


def of_finding(finding: Finding, seconds: float) -> Outcome:
    """Return the outcome of one rule."""
    verdict = verdict_of(finding)
    codes = () if verdict is Verdict.PROVEN else (finding.code,)
    evidence = {name: plain(value) for name, value in finding.evidence.items()}
    return Outcome(verdict, _short(finding.message), codes, evidence, seconds)


def of_fresh(finding: Finding, seconds: float) -> Outcome:
    """Return the outcome of the rule on a fresh adapter, where it is known that the adapter is fresh.

    The rule cannot tell a trained adapter from a method that does not begin with the model as it was.
    """
    outcome = of_finding(finding, seconds)
    if outcome.verdict is not Verdict.UNKNOWN or "difference" not in finding.evidence:
        return outcome
    said = (
        f"the method does not begin with the model as it was: outputs differ by {outcome.evidence['difference']}"
    )
    return replace(outcome, verdict=Verdict.FAILED, message=said)


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a check that several outcomes decide: the worst of them counts."""
    found = tuple(outcomes)
    worst = next(verdict for verdict in Verdict if verdict in {outcome.verdict for outcome in found})
    missed = [outcome for outcome in found if outcome.verdict is not Verdict.PROVEN]
    return Outcome(
        worst,
        _short("; ".join(outcome.message for outcome in missed or found)),
        tuple(code for outcome in missed for code in outcome.codes),
        {name: value for outcome in found for name, value in outcome.evidence.items()},
        sum(outcome.seconds for outcome in found),
    )


def verdict_of(finding: Finding) -> Verdict:
    """Return what a finding means for its check: a rule that crashed failed, one that could not decide did not."""
    if finding.severity is Severity.OK:
        return Verdict.PROVEN
    if finding.severity is not Severity.UNKNOWN:
        return Verdict.FAILED
    if finding.evidence.get("refused") or finding.evidence.get("error") == NotImplementedError.__name__:
        return Verdict.REFUSED
    return Verdict.FAILED if "error" in finding.evidence else Verdict.UNKNOWN


def plain(value: Any) -> Any:
    """Return a figure as JSON has it; a number that is not finite becomes its name."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, bool, type(None))) else _short(str(value))


def _class(error: BaseException) -> str:
    return type(error).__name__


def _place(error: BaseException) -> dict[str, str]:
    """Return the file and line that raised, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"raised_at": f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}"} if frames else {}


def _short(text: str) -> str:
    return printable(" ".join(text.split()), _LONGEST)
