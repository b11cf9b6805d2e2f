"""Model types by name: what transformers has, and what it lacks without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graftkit.surveying.sources import model_types

# In a process of its own, in which nothing has imported transformers yet.
_WITHOUT = """
import sys
from graftkit.surveying.sources import model_types
{code}
heavy = {{"torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _WITHOUT.format(code=code)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "assert not model_types.is_model_type('lamma')",
        "assert not model_types.is_model_type('')",
        "assert 'llama' in model_types.similar_types('lamma')",
        "assert model_types.similar_types('zzzzzzzzzzzz') is None",
        "assert model_types.transformers_version()[0].isdecimal()",
    ],
)
def test_a_wrong_type_is_told_without_transformers(code: str) -> None:
    done = _run(code)
    assert done.returncode == 0, done.stderr


def test_no_type_is_refused_by_its_source() -> None:
    """Every type of the installed transformers stands in the tables that are read as text."""
    from transformers import CONFIG_MAPPING

    source = model_types._source()
    assert source is not None
    assert set(CONFIG_MAPPING.keys()) <= source.types <= source.texts
    assert model_types.model_types() == tuple(sorted(CONFIG_MAPPING.keys()))


def test_a_type_that_somebody_registered_is_known() -> None:
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class HouseConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
        model_type = "house"

    assert not model_types.is_model_type("house")
    AutoConfig.register("house", HouseConfig)
    try:
        assert model_types.is_model_type("house")
    finally:
        CONFIG_MAPPING._extra_content.pop("house")
