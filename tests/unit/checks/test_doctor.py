"""The doctor finds what is wrong before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checks.observed import by_code

import graftkit as gk
from graftkit.attaching.attach import attach_stock
from graftkit.checks.doctor import doctor, static_inputs
from graftkit.errors import AdapterError, SourceError
from graftkit.findings import Severity
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.surveying.sources import load_config as load


def recipe(folder: Path, text: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def test_without_arguments_the_environment_is_checked() -> None:
    found = by_code(doctor())
    assert found["GK002"].severity is Severity.OK
    assert found["GK100"].severity is Severity.UNKNOWN
    assert set(found["GK100"].evidence["missing"]) == {"base", "recipe"}


def test_no_rule_that_needs_a_live_model_is_run() -> None:
    assert not {"GK601", "GK203"} & by_code(doctor()).keys()


@pytest.mark.rule_fails("GK100")
def test_gk100_a_recipe_that_cannot_be_met(tmp_path: Path) -> None:
    wrong = recipe(tmp_path, "model: google/gemma-4-E2B-it\nadapter:\n  targets: [q_proj, k_prj]\n")
    found = by_code(doctor(recipe=wrong))["GK100"]
    assert found.severity is Severity.ERROR
    assert "k_prj" in f"{found.message} {found.where}"
    assert (found.file, found.line) == (str(wrong.path), 2)


@pytest.mark.rule_passes("GK100")
def test_gk100_passes_on_a_recipe_that_can_be_met(tmp_path: Path) -> None:
    right = recipe(tmp_path, "model: google/gemma-4-E2B-it\nadapter:\n  targets: [q_proj]\n  scope: language\n")
    found = by_code(doctor(recipe=right))
    assert found["GK100"].severity is Severity.OK
    assert found["GK100"].evidence["sites"] == 35
    assert not [f for f in found.values() if f.severity is Severity.ERROR]


@pytest.mark.rule_fails("GK100")
@pytest.mark.parametrize(
    ("fields", "evidence"),
    [
        pytest.param("{target_modules: 5}", {"problems": 1}, id="a field of another kind"),
        pytest.param("{peft_type: FOO}", {"problems": 1}, id="no method"),
        pytest.param(
            "{target_modules: [q_proj], lora_alfa: 32}", {"ignored": "lora_alfa"}, id="a misspelled field"
        ),
        pytest.param("{target_modules: [k_prj]}", {"refusal": "nothing"}, id="refused by PEFT"),
        pytest.param(
            "{target_modules: [q_proj], layers_pattern: h}", {"refusal": "config"}, id="refused by its class"
        ),
    ],
)
def test_gk100_a_stock_configuration_that_peft_refuses(
    tmp_path: Path, fields: str, evidence: dict[str, Any]
) -> None:
    wrong = recipe(tmp_path, f"model: llama\nadapter:\n  peft_config: {fields}\n")
    found = by_code(doctor(recipe=wrong))["GK100"]
    assert found.severity is Severity.ERROR
    assert (found.evidence, found.file, found.line) == (evidence, str(wrong.path), 3)


@pytest.mark.rule_passes("GK100")
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param("{target_modules: [q_proj]}", id="LoRA by default"),
        pytest.param("{peft_type: IA3, target_modules: [k_proj], feedforward_modules: []}", id="another method"),
    ],
)
def test_gk100_passes_on_a_stock_configuration(tmp_path: Path, fields: str) -> None:
    written = recipe(tmp_path, f"model: llama\nadapter:\n  peft_config: {fields}\n")
    assert by_code(doctor(recipe=written))["GK100"].severity is Severity.OK
    stock = written.fields.adapter.peft_config
    assert stock is not None
    assert attach_stock(gk.twin("llama"), stock).active_adapters == ["default"]


def test_an_unknown_architecture_is_a_finding(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gemma9", "transformers_version": "9.9.0"}))
    found = by_code(doctor(config))["GK001"]
    assert (found.severity, found.evidence["written_by"]) == (Severity.ERROR, "9.9.0")


def test_a_misspelled_model_type_is_the_users_error() -> None:
    with pytest.raises(SourceError, match="gemma9"):
        doctor("gemma9")


def test_an_adapters_configuration_without_its_weights(tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    found = by_code(doctor("google/gemma-4-E2B-it", adapter=tmp_path))
    assert found["GK101"].severity is Severity.ERROR
    with pytest.raises(AdapterError) as caught:
        doctor("gemma4", adapter=tmp_path / "absent")
    assert caught.value.code == "adapter-config"


def test_the_settings_of_the_recipe_are_used(tmp_path: Path) -> None:
    quiet = recipe(tmp_path, "model: gemma4\nchecks:\n  select: [GK1]\n  ignore: [GK103]\n")
    codes = by_code(doctor(recipe=quiet)).keys()
    assert codes
    assert all(code.startswith("GK1") and code != "GK103" for code in codes)
    assert by_code(doctor(recipe=quiet, settings=CheckSettings(select=("GK002",)))).keys() == {"GK002"}


def test_names_in_an_adapters_configuration_are_safe_to_print(tmp_path: Path) -> None:
    """Control characters are escaped, as in ``check``."""
    fields = {
        "peft_type": "LORA",
        "target_modules": ["q_proj", "\x1b]0;owned\x07"],
        "r": 8,
        "exclude_modules": ["\x1b[2J"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    report = doctor("llama", adapter=tmp_path)
    assert "owned" in str(report)
    assert not {"\x1b", "\x07"} & set(str(report))


def test_the_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gk.twin("llama").config.save_pretrained(tmp_path)
    read, seen = load.read_config_json, []
    monkeypatch.setattr(load, "read_config_json", lambda path, where: seen.append(path) or read(path, where))
    found = by_code(doctor(tmp_path))
    assert found["GK001"].severity is Severity.OK
    assert seen == [tmp_path / "config.json"]


def test_a_live_model_brings_its_configuration() -> None:
    model = gk.twin("llama")
    assert static_inputs(model).config == model.config.to_dict()
    assert static_inputs(torch.nn.Linear(2, 2)).config is None
