"""A recipe is run on the twin up to its first batch, which shows what its settings would break."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.checks.observed import by_code

import graftkit as gk
from graftkit.checks.rehearse import rehearse
from graftkit.findings import Severity
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.settings import CheckSettings

GOOD = """\
model: google/gemma-4-E2B-it
adapter:
  targets: attention
  scope: [language]
  r: 4
data:
  modalities: [text]
"""


def rehearsed(folder: Path, text: str, *codes: str) -> dict[str, gk.Finding]:
    file = folder / "recipe.yaml"
    file.write_text(text)
    found = by_code(rehearse(read_recipe(file)))
    assert not codes or set(codes) <= found.keys()
    return found


def bad(found: dict[str, gk.Finding]) -> set[str]:
    return {code for code, finding in found.items() if finding.severity is Severity.ERROR}


def test_a_good_recipe_has_no_error(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, GOOD)
    assert bad(found) == set()
    assert found["GK601"].severity is Severity.OK
    assert found["GK202"].severity in {Severity.OK, Severity.INFO}


def test_the_report_says_where_the_time_went(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    report = rehearse(read_recipe(file), settings=CheckSettings(select=("GK101", "GK115", "GK601")))
    assert set(report.seconds) == {"architecture", "model", "adapter", "batch"}
    assert all(spent > 0 for spent in report.seconds.values())
    by_rule = report.to_dict()["seconds"]["rules"]
    assert list(by_rule) == ["GK101", "GK115", "GK601"]
    assert all(spent > 0 for spent in by_rule.values())


def test_reentrant_checkpointing_is_found_with_its_line(tmp_path: Path) -> None:
    text = GOOD + "args:\n  gradient_checkpointing_kwargs:\n    use_reentrant: true\n"
    found = rehearsed(tmp_path, text)["GK202"]
    assert found.severity is Severity.ERROR
    assert found.line == 10
    assert found.fix is not None


def test_a_tower_that_no_batch_feeds_is_found(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, GOOD.replace("[language]", "[language, vision]"))
    assert "GK203" in bad(found)
    assert found["GK203"].line == 2


def test_a_stock_configuration_that_peft_refuses_is_found(tmp_path: Path) -> None:
    text = "model: google/gemma-4-E2B-it\nadapter:\n  peft_config: {peft_type: LORA, target_modules: [q_proj]}\n"
    found = rehearsed(tmp_path, text)
    assert {"GK100", "GK101"} <= bad(found)
    assert "is not supported" in found["GK100"].message
    assert found["GK601"].evidence["missing"] == ("model", "batch")


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_a_rank_beyond_the_twin_s_layers_is_none_beyond_the_model_s(init: str, tmp_path: Path) -> None:
    text = f"model: llama\nadapter: {{targets: attention, r: 128, options: {{init_lora_weights: {init}}}}}\n"
    found = rehearsed(tmp_path, text)
    assert bad(found) == set()
    assert found["GK601"].severity is Severity.OK


def test_packing_on_a_hybrid_is_found(tmp_path: Path) -> None:
    text = "model: qwen3_next\nadapter: {targets: attention}\nargs: {packing: true}\n"
    assert "GK205" in bad(rehearsed(tmp_path, text))


def test_a_quantized_base_is_rehearsed_quantized(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = rehearsed(tmp_path, GOOD + "quantization: 4bit\n")
    assert bad(found) == set()
    assert found["GK601"].severity is Severity.UNKNOWN


def test_a_plan_that_the_quantized_model_refuses_is_found(tmp_path: Path) -> None:
    """The architecture alone does not show it: no layer of the unquantized model refuses PiSSA."""
    pytest.importorskip("bitsandbytes")
    recipe = "model: llama\nadapter: {targets: attention, options: {init_lora_weights: pissa}}\n"
    assert bad(rehearsed(tmp_path, recipe)) == set()
    found = rehearsed(tmp_path, recipe + "quantization: 4bit\n")
    assert bad(found) == {"GK100"}
    assert found["GK100"].evidence["error"] == "initializer-quantized"
    assert found["GK601"].evidence["missing"] == ("model", "batch")


@pytest.mark.rule_passes("GK508")
def test_gk508_passes_on_ia3_over_a_quantized_base(tmp_path: Path) -> None:
    """IA3 refuses to unload such a base; loading the saved adapter works."""
    pytest.importorskip("bitsandbytes")
    found = rehearsed(tmp_path, "model: llama\nadapter: {method: ia3}\nquantization: 4bit\n")
    assert found["GK508"].severity is Severity.OK, found["GK508"].message
    assert found["GK115"].severity is Severity.OK, found["GK115"].message


def test_prompt_learning_is_not_called_wrong(tmp_path: Path) -> None:
    stock = "{peft_type: PROMPT_TUNING, task_type: CAUSAL_LM, num_virtual_tokens: 2}"
    found = rehearsed(tmp_path, f"model: llama\nadapter: {{peft_config: {stock}}}\n")
    assert bad(found) == set()
    assert found["GK100"].severity is Severity.UNKNOWN
    assert found["GK601"].evidence["missing"] == ("model", "batch")
