"""The rules on installed versions, with environments made for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import seen
from torch import nn

import graftkit as gk
from graftkit.checks.rules.environment.versions_work_together import COMBINATIONS
from graftkit.env import environment
from graftkit.errors import ModelTypeError
from graftkit.families import all_families
from graftkit.surveying.checkpoint.comparison import Absent, Checkpoint

ERROR, INFO, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.INFO, gk.Severity.OK, gk.Severity.UNKNOWN
WARNING = gk.Severity.WARNING
HERE = environment()["packages"]


# ---- GK001 ----


@pytest.mark.rule_fails("GK001")
def test_gk001_a_model_type_from_the_future(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "from_the_future", "transformers_version": "99.1.0.dev0"}))
    with pytest.raises(ModelTypeError) as caught:
        gk.survey(str(file))
    found = seen("GK001", config=caught.value.config, environment=HERE)
    assert (found.severity, found.where) == (ERROR, "from_the_future")
    assert found.help == "pip install 'transformers>=99.1.0'"


@pytest.mark.parametrize(
    ("fields", "verdict", "advice"),
    [
        pytest.param(
            {"model_type": "lama", "transformers_version": "4.40.0"},
            ERROR,
            "--upgrade",
            id="written by an older one",
        ),
        pytest.param({"model_type": "lama"}, ERROR, "--upgrade", id="written by an unknown one"),
        pytest.param(
            {"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, INFO, "trust_remote_code", id="own code"
        ),
        pytest.param({}, UNKNOWN, "", id="no model type"),
    ],
)
def test_gk001_advice(fields: dict[str, Any], verdict: gk.Severity, advice: str) -> None:
    found = seen("GK001", config=fields, environment=HERE)
    assert found.severity is verdict
    assert advice in str(found.help)


@pytest.mark.rule_passes("GK001")
def test_gk001_passes_on_what_is_known() -> None:
    assert seen("GK001", config={"model_type": "llama"}, environment=HERE).severity is OK


# ---- GK003 ----


def _compared(**fields: Any) -> Checkpoint:
    return Checkpoint(tensors=9, bytes=9, dtypes=(("F32", 9),), unknown=(), **fields)


@pytest.mark.rule_fails("GK003")
def test_gk003_weights_under_another_name(e2b: nn.Module, tmp_path: Path) -> None:
    """The keys of transformers#45388."""
    e2b.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {key.replace(".linear.weight", ".weight"): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    found = seen("GK003", base_files=gk.survey(str(tmp_path)).checkpoint)
    wrapped = sum(key.endswith(".linear.weight") for key in tensors)
    assert found.severity is ERROR
    assert (found.evidence["missing"], found.evidence["renamed"]) == (wrapped, wrapped)


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        pytest.param(_compared(absent=Absent(weights=("a.weight",))), ERROR, id="a weight"),
        pytest.param(_compared(mismatched=("a.weight",)), ERROR, id="another shape"),
        pytest.param(_compared(absent=Absent(heads=("score.weight",))), WARNING, id="a new head"),
        pytest.param(_compared(absent=Absent(buffers=("a.input_min",))), WARNING, id="a buffer"),
        pytest.param(_compared(undecided="it is quantized"), UNKNOWN, id="not compared"),
    ],
)
def test_gk003_verdicts(files: Checkpoint, verdict: gk.Severity) -> None:
    found = seen("GK003", base_files=files)
    assert found.severity is verdict
    assert found.help or verdict is UNKNOWN


@pytest.mark.rule_passes("GK003")
def test_gk003_passes_on_what_was_saved(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.save_pretrained(tmp_path)
    assert seen("GK003", base_files=gk.survey(str(tmp_path)).checkpoint).severity is OK


# ---- GK002 ----


@pytest.mark.rule_fails("GK002")
@pytest.mark.parametrize(
    ("installed", "package", "instead"),
    [
        pytest.param(
            {"peft": "0.19.0", "torch": "2.5.1+cu121"}, "peft", "torch>=2.7", id="a type that torch does not have"
        ),
        pytest.param(
            {"transformers": "5.10.2", "torch": "2.4.1"},
            "transformers",
            "torch>=2.7",
            id="the same in transformers",
        ),
        pytest.param(
            {"peft": "0.18.0", "transformers": "4.51.3"}, "peft", "transformers>=4.52.1", id="peft is too new"
        ),
        pytest.param({"peft": "0.17.1", "transformers": "5.9.0"}, "peft", "peft>=0.18.0", id="peft is too old"),
    ],
)
def test_gk002_combinations_that_do_not_work(installed: dict[str, str], package: str, instead: str) -> None:
    found = seen("GK002", environment={**HERE, **installed})
    assert (found.severity, found.where) == (ERROR, package)
    assert f"pip install '{instead}'" in str(found.help)
    assert any(row.source in str(found.help) for row in COMBINATIONS if row.instead == instead)


@pytest.mark.rule_passes("GK002")
@pytest.mark.parametrize(
    ("version", "verdict"), [("5.4.0", ERROR), ("5.5.1", ERROR), ("5.5.2", OK), ("5.6.0.dev0", OK)]
)
def test_gk002_what_a_family_needs(version: str, verdict: gk.Severity) -> None:
    config = {"model_type": "gemma4"}
    assert seen("GK002", environment={**HERE, "transformers": version}, config=config).severity is verdict
    assert seen("GK002", environment={**HERE, "transformers": version}).severity is OK


@pytest.mark.parametrize(
    ("installed", "verdict"),
    [
        pytest.param({}, OK, id="what is installed here"),
        pytest.param({"peft": "0.19.0", "torch": "2.7.0"}, OK, id="torch that has the type"),
        pytest.param({"peft": "0.19.1", "torch": "2.5.1"}, OK, id="peft that does without"),
        pytest.param({"peft": None, "torch": None}, OK, id="not installed"),
        pytest.param({"peft": "a fork", "torch": "2.5.1"}, UNKNOWN, id="no version at all"),
    ],
)
def test_gk002_what_is_not_called_wrong(installed: dict[str, Any], verdict: gk.Severity) -> None:
    assert seen("GK002", environment={**HERE, **installed}, config={"model_type": "gemma4"}).severity is verdict


def test_every_row_of_the_version_table_is_whole() -> None:
    assert COMBINATIONS
    for row in COMBINATIONS:
        assert row.source.startswith("https://")
        assert len(row.versions) >= 2
        assert all(SpecifierSet(versions) for versions in row.versions.values())


def test_every_requirement_of_a_family_is_a_least_version() -> None:
    needs = [need for family in all_families() for need in family.requires]
    assert needs
    for need in needs:
        assert need.source.startswith("https://")
        assert need.versions.startswith(">=")
        assert SpecifierSet(need.versions)
