"""What the tests of the serving room share."""

from __future__ import annotations

import pytest
from tests.unit.serving.signed import Signed, write_signed


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    """A twin of Qwen 3 with a signed adapter; copy it before changing a file."""
    return write_signed(tmp_path_factory.mktemp("signed"))
