"""``rule_fails("GK601")`` and ``rule_passes("GK601")`` are proven: the test has to observe that verdict."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tests.unit.checks.observed import OBSERVED

from graftkit.findings import Severity

VERDICTS = {"rule_fails": {Severity.ERROR, Severity.WARNING}, "rule_passes": {Severity.OK}}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that never saw the verdict that its marker promises."""
    OBSERVED.clear()
    outcome = yield
    for marker in item.iter_markers():
        if marker.name in VERDICTS:
            for code in marker.args:
                verdicts = {found.severity for found in OBSERVED if found.code == code}
                wanted = VERDICTS[marker.name]
                assert verdicts & wanted, f"{marker.name}({code!r}): observed {sorted(verdicts) or 'nothing'}"
    return outcome
