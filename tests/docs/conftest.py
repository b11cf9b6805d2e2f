"""One process that runs commands, and one folder of models, for all pages."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.server import Programs, programs
from tests.docs.stand_ins import Models


@pytest.fixture(scope="session")
def run_in() -> Iterator[Programs]:
    """``graft`` and ``python``, offline; see ``server.py``."""
    with (
        tempfile.TemporaryDirectory(prefix="graftkit-docs-") as folder,
        programs(Path(folder), "tests.docs.digit_pictures") as running,
    ):
        yield running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))
