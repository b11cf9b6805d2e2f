"""Which release brought a model type."""

from __future__ import annotations

import zipfile
from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import CONFIG_MAPPING

from graftkit.errors import GraftError
from graftkit.matrix.introduced import introduced, read
from graftkit.matrix.newest import requirements
from graftkit.matrix.wanted import TABLE as WANTED
from graftkit.matrix.wanted import wanted
from graftkit.matrix.write_introduced import table_of

AUTO = """
from collections import OrderedDict
CONFIG_MAPPING_NAMES = OrderedDict([("llama", "LlamaConfig"), ("not-a-config", "Llama")])
CONFIG_MAPPING_NAMES.update({"gpt-sw3": "GPT2Config"})
"""
CONFIGURATION = """
class LlamaVisionConfig(PreTrainedConfig):
    model_type = "llama_vision"
class LlamaAudioConfig(PreTrainedConfig):
    model_type: str = "llama_audio"
class Other:
    model_type = ""
"""


def wheel(folder: Path, version: str, day: tuple[int, int, int], configuration: str) -> Path:
    path = folder / f"transformers-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("transformers/models/auto/auto_mappings.py", AUTO)
        files.writestr("transformers/models/llama/configuration_llama.py", configuration)
        files.writestr("transformers/models/llama/modeling_llama.py", 'model_type = "no"')
        metadata = zipfile.ZipInfo(f"transformers-{version}.dist-info/METADATA", (*day, 0, 0, 0))
        files.writestr(metadata, "")
    return path


def test_the_first_release_that_knew_a_type_brought_it(tmp_path: Path) -> None:
    later = wheel(tmp_path, "5.10.0", (2026, 2, 3), CONFIGURATION)
    earlier = wheel(tmp_path, "5.9.0", (2025, 12, 1), "")
    table = read(table_of([later, earlier], None))
    assert table.release_of == {
        "llama": Version("5.9.0"),
        "gpt-sw3": Version("5.9.0"),
        "llama_vision": Version("5.10.0"),
        "llama_audio": Version("5.10.0"),
    }
    assert list(table.released.items()) == [
        (Version("5.9.0"), date(2025, 12, 1)),
        (Version("5.10.0"), date(2026, 2, 3)),
    ]


def test_wheels_are_added_to_the_table_that_is_there(tmp_path: Path) -> None:
    first = table_of([wheel(tmp_path, "5.9.0", (2025, 12, 1), "")], None)
    second = wheel(tmp_path, "5.10.0", (2026, 2, 3), CONFIGURATION)
    assert table_of([second], first) == table_of([tmp_path / "transformers-5.9.0-py3-none-any.whl", second], None)


def test_a_type_that_no_release_of_the_table_knows_is_newer_than_all() -> None:
    assert introduced().since("5.22", ["llama", "lfm3", "mistral_large4", "not_yet"]) == ("lfm3", "not_yet")


@pytest.mark.parametrize("release", ["4.0", "soon"])
def test_a_release_before_the_table_is_refused(release: str) -> None:
    with pytest.raises(GraftError) as error:
        introduced().since(release, [])
    assert error.value.code == "release-unknown"


def test_the_table_has_every_type_of_the_tested_transformers() -> None:
    assert not set(CONFIG_MAPPING) - set(introduced().release_of)


def test_wanted_are_known_types_each_listed_once() -> None:
    listed = [line.strip(' ",\n') for line in WANTED.read_text("utf-8").splitlines() if line.startswith('  "')]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(CONFIG_MAPPING)
    assert all(why.strip() for why in wanted().values())


def test_every_type_of_this_year_is_wanted_or_named_as_a_part() -> None:
    table, listed = introduced(), set(WANTED.read_text("utf-8").split('"'))
    new = {name for name, release in table.release_of.items() if table.released[release] >= date(2026, 1, 1)}
    assert new
    assert not new & set(CONFIG_MAPPING) - listed


def test_the_newest_releases_are_asked_for_without_bounds_but_for_torch() -> None:
    pyproject = """
[project]
dependencies = ["torch>=2.7", "transformers>=5.23,<6", "ruamel.yaml>=0.19"]
optional-dependencies = { train = ["trl>=1.16,<2"], quant = ["bitsandbytes>=0.50"] }
"""
    names = ("torch==2.13.0", "transformers", "ruamel.yaml", "trl", "bitsandbytes")
    assert requirements(pyproject, "accelerate==1.15.0\ntorch==2.13.0\n") == names
