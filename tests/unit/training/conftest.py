"""Datasets are cached as in the tests that train."""

from tests.training.conftest import datasets_cache

__all__ = ["datasets_cache"]
