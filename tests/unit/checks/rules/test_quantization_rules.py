"""The rules on quantized bases: sizes from real geometries, and what transformers really packs and trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import prepare_model_for_kbit_training
from ruamel.yaml import YAML
from tests.unit.checks.observed import checked, seen
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.trainer_utils import validate_quantization_for_training

import graftkit as gk
from graftkit.checks.engine.fixing import fix_all
from graftkit.findings import Report
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training, training_of

ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
E2B, MOE, DENSE = "google/gemma-4-E2B-it", "google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it"
FOUR = Training(quantization="4bit")
Twins = Callable[[str], nn.Module]


# ---- GK301 and GK302: sizes ----


@pytest.mark.rule_fails("GK301")
def test_gk301_experts_stay_in_16_bit() -> None:
    base = gk.survey(MOE)
    found = seen("GK301", base=base, training=FOUR)
    experts = sum(site.params for site in base if site.role == "expert")
    assert (found.severity, found.evidence["expert_bytes"]) == (WARNING, 2 * experts)
    assert found.evidence["total_bytes"] > 45e9
    assert found.evidence["hoped_bytes"] < 15e9


def test_gk301_experts_of_a_twin_are_not_replaced(twin_of: Twins) -> None:
    """What the rule rests on: transformers packs plain linears and nothing else."""
    model = twin_of(MOE)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), BitsAndBytesConfig(load_in_4bit=True))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert experts
    assert all(type(p) is nn.Parameter for p in experts)


@pytest.mark.rule_passes("GK301")
@pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])
def test_gk301_passes_on_a_dense_model(quantization: str | None) -> None:
    assert seen("GK301", base=gk.survey(DENSE), training=Training(quantization=quantization)).severity is OK


@pytest.mark.rule_fails("GK302")
@pytest.mark.parametrize("name", [E2B, MOE])
def test_gk302_preparation_upcasts_what_stayed(name: str) -> None:
    base = gk.survey(name)
    found = seen("GK302", base=base, training=FOUR)
    assert found.severity is WARNING
    assert found.evidence["upcast_bytes"] > 0.25 * found.evidence["total_bytes"]


@pytest.mark.rule_fails("GK302")
def test_gk302_what_is_predicted_is_what_peft_does(twin_of: Twins) -> None:
    model = twin_of(MOE).to(torch.bfloat16)
    base = gk.survey(model)
    quantization = gk.plan(base, quantization="4bit").quantization
    assert quantization is not None
    # Stands in for quantized weights: PEFT casts only what is of a 16-bit type.
    for path in quantization.quantized:
        model.get_submodule(path).requires_grad_(False).to(torch.float32)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    after = sum(p.numel() * p.element_size() for p in prepare_model_for_kbit_training(model).parameters())
    assert after - before == seen("GK302", base=base, training=FOUR).evidence["upcast_bytes"]


def test_gk302_trl_does_not_prepare(tmp_path: Path) -> None:
    """A recipe is trained by TRL, which leaves the preparation out: worth knowing, no more."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {MOE}\nquantization: 4bit\n")
    recipe = read_recipe(file)
    found = seen("GK302", base=gk.survey(MOE), recipe=recipe, training=training_of(recipe))
    assert found.severity is INFO
    sources = Path(trl.__file__).parent.joinpath("trainer").glob("*.py")
    assert not [file.name for file in sources if "prepare_model_for_kbit_training(" in file.read_text("utf-8")]


@pytest.mark.rule_passes("GK302")
def test_gk302_passes_where_little_stays() -> None:
    assert seen("GK302", base=gk.survey(DENSE), training=FOUR).severity is OK
    assert seen("GK302", base=gk.survey(MOE), training=Training()).severity is OK
    settings = CheckSettings(rules={"GK302": {"share": 2.0}})
    assert seen("GK302", base=gk.survey(MOE), training=FOUR, settings=settings).severity is OK


# ---- GK303 ----


def _replaced(model: nn.Module, options: Mapping[str, Any]) -> set[str]:
    """What transformers packs with these options."""
    config = BitsAndBytesConfig(**options)
    skip = config.llm_int8_skip_modules
    replace_with_bnb_linear(model, get_keys_to_not_convert(model) if skip is None else skip, config)
    return {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@pytest.mark.rule_fails("GK303")
@pytest.mark.parametrize("skip", [None, ["lm_head"], ["model.vision_tower", "lm_head"]], ids=str)
def test_gk303_towers_are_replaced(twin_of: Twins, skip: list[str] | None) -> None:
    model = twin_of(E2B)
    base = gk.survey(model)
    options = {"load_in_4bit": True, "llm_int8_skip_modules": skip}
    found = seen("GK303", base=base, training=FOUR, config={"quantization_config": options})
    language = {site.path for site in base if site.tower in {"language", "head"}}
    assert (found.severity, found.evidence["packed"]) == (WARNING, len(_replaced(model, options) - language))


@pytest.mark.rule_fails("GK303")
def test_gk303_a_quantized_base_is_inspected_itself(twin_of: Twins) -> None:
    model = twin_of(E2B)
    _replaced(model, {"load_in_4bit": True})
    found = seen("GK303", base=gk.survey(model), training=Training())
    assert found.severity is WARNING


@pytest.mark.rule_fails("GK303")
def test_gk303_the_fix_keeps_towers_whole(twin_of: Twins, tmp_path: Path) -> None:
    model, file = twin_of(E2B), tmp_path / "recipe.yaml"
    base = gk.survey(model)
    loading = {"quantization_config": {"load_in_4bit": True}}
    with file.open("w") as stream:
        YAML().dump({"model": E2B, "args": {"model_init_kwargs": loading}}, stream)

    def check() -> Report:
        recipe = read_recipe(file)
        return checked(["GK303"], recipe=recipe, training=training_of(recipe), base=base)

    report, applied = fix_all(check, recipe=file)
    assert [finding.line for finding in applied] == [4]
    assert [finding.severity for finding in report] == [OK]
    options = read_recipe(file).args["model_init_kwargs"]["quantization_config"]
    assert {base[path].tower for path in _replaced(model, options)} == {"language"}


@pytest.mark.rule_passes("GK303")
def test_gk303_passes(tmp_path: Path) -> None:
    base = gk.survey(E2B)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {E2B}\nquantization: 4bit\nadapter: {{peft_config: {{target_modules: [q_proj]}}}}\n")
    recipe = read_recipe(file)
    assert seen("GK303", base=base, recipe=recipe, training=training_of(recipe)).severity is OK
    plan = gk.plan(base, quantization="4bit")
    assert seen("GK303", base=base, training=FOUR, plan=plan).severity is OK
    assert seen("GK303", base=base, training=Training()).severity is OK
    assert seen("GK303", base=gk.survey("llama"), training=FOUR).severity is OK


# ---- GK304 ----


@pytest.mark.rule_fails("GK304")
@pytest.mark.parametrize(
    ("kind", "unpacks"),
    [
        pytest.param("mxfp4", True, id="MXFP4"),
        pytest.param("nvfp4", False, id="NVFP4"),
        pytest.param("fbgemm_fp8", False, id="FBGEMM FP8"),
    ],
)
def test_gk304_kinds_that_cannot_train(twin_of: Twins, kind: str, unpacks: bool) -> None:
    found = seen("GK304", config={"quantization_config": {"quant_method": kind}})
    assert found.severity is ERROR
    assert ("dequantize=True" in str(found.help)) is unpacks
    _trainer_refuses(twin_of("llama"), kind)


def _trainer_refuses(model: nn.Module, kind: str) -> None:
    """transformers' own check, on an adapted model that says it was loaded by this quantizer."""
    from peft import LoraConfig, get_peft_model
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config({"quant_method": kind}, pre_quantized=True)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.base_model.model.hf_quantizer = quantizer
    adapted.base_model.model.is_quantized = True
    with pytest.raises(ValueError, match="do not support training"):
        validate_quantization_for_training(adapted)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        pytest.param(None, OK, id="not quantized", marks=pytest.mark.rule_passes("GK304")),
        pytest.param({"quant_method": "mxfp4", "dequantize": True}, OK, id="unpacked while loading"),
        pytest.param({"quant_method": "bitsandbytes", "load_in_4bit": True}, OK, id="bitsandbytes"),
        pytest.param({"quant_method": "fp8", "weight_block_size": [128, 128]}, OK, id="fine-grained FP8"),
        pytest.param({"quant_method": "of next year"}, UNKNOWN, id="a kind that transformers does not know"),
        pytest.param({"quant_method": "compressed-tensors"}, UNKNOWN, id="a package that is not installed"),
    ],
)
def test_gk304_what_is_not_called_wrong(given: Any, verdict: gk.Severity) -> None:
    assert seen("GK304", config={"quantization_config": given}).severity is verdict
