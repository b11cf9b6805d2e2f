"""The proof that one model type goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import graftkit as gk
from graftkit.checks.verify import contract


@dataclass(frozen=True)
class Outcome:
    """How far a model type came.

    Attributes:
        stage: "proven", "twin" (none can be built), "plan", "attach" or "checks".
        codes: the error's code, or the codes of the checks that did not hold.
        said: what was said, for the reader of a failed test.
    """

    stage: str
    codes: tuple[str, ...] = ()
    said: str = ""


def prove(model_type: str) -> Outcome:
    """Twin, plan every linear and every expert, attach exactly that, and the five contract checks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # PEFT draws the adapter's weights from the global generator
        return _prove(model_type)


def _prove(model_type: str) -> Outcome:
    try:
        twin = gk.twin(model_type)
        batch = gk.example_batch(twin)
    except gk.GraftError as error:
        return Outcome("twin", (error.code,), str(error))
    try:
        plan = gk.plan(twin, targets=["all-linear", "experts"], r=2, allow_unmatched=True)
    except gk.GraftError as error:
        return Outcome("plan", (error.code,), str(error))
    try:
        adapted = gk.attach(twin, plan)
    except gk.GraftError as error:
        return Outcome("attach", (error.code,), str(error))
    report = gk.verify(adapted, batch, settings=contract())
    missed = tuple(f.code for f in report if f.severity is not gk.Severity.OK)
    return Outcome("checks", missed, str(report)) if missed else Outcome("proven")


@pytest.fixture
def proof() -> Callable[[str], Outcome]:
    return prove
