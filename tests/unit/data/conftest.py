"""What the tests of the data room share."""

from __future__ import annotations

from tests.training.conftest import datasets_cache

__all__ = ["datasets_cache"]
