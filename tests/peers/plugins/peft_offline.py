"""A pytest plugin: PEFT's tests fail at once where they want a model of the hub; asking for it takes a minute."""

from collections import defaultdict

import pytest


class _Everything(defaultdict[str, int]):
    """PEFT's record of the models that were downloaded already, and for which it does not go online again."""

    def __contains__(self, _: object) -> bool:
        return True


@pytest.hookimpl
def pytest_collection_finish() -> None:
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _Everything(int)
