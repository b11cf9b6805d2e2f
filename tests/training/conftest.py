"""Datasets that these tests read are cached in a folder of their own, not in the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let ``datasets`` cache in a temporary folder; yield it."""
    config = pytest.importorskip("datasets").config
    before, folder = config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("datasets")
    config.HF_DATASETS_CACHE = folder
    yield folder
    config.HF_DATASETS_CACHE = before
