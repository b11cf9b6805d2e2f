"""What the tests of the training room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.training import gemma
from tests.training.conftest import datasets_cache

from graftkit.demo.processor import known_to_transformers

__all__ = ["datasets_cache"]


@pytest.fixture
def known() -> Iterator[None]:
    """Let AutoProcessor find the small Gemma 4's processor."""
    with known_to_transformers(gemma.processor()):
        yield
