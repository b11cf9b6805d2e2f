"""``rule_fails("GK601")`` and ``rule_passes("GK601")`` are proven: the test has to observe that verdict."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tests.unit.checks.observed import OBSERVED, not_observed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that did not see what its markers promise."""
    OBSERVED.clear()
    outcome = yield
    assert not not_observed(item.iter_markers())
    return outcome
