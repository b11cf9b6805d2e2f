"""Faults of PEFT and transformers are found on a model's structure, and are what PEFT then really does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import graftkit as gk
from graftkit.surveying.faults import Fault

UPSTREAM = Path(gk.__file__).parents[2]


@pytest.mark.parametrize(("name", "any_lost"), [("laguna", True), ("inkling2_text", True), ("qwen3_moe", False)])
def test_what_peft_drops_on_reload_is_what_the_plan_warns_of(
    tmp_path: Path, twin_of: Callable[[str], nn.Module], name: str, any_lost: bool
) -> None:
    twin = twin_of(name)
    plan = gk.plan(twin, targets=["all-linear", "experts"], r=2, allow_unmatched=True)
    adapted = gk.attach(copy.deepcopy(twin), plan)
    with torch.no_grad():
        saved = {n: parameter.normal_() for n, parameter in adapted.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path)
        loaded = dict(PeftModel.from_pretrained(twin, tmp_path).named_parameters())
    lost = {name.partition(".lora_")[0] for name, tensor in saved.items() if not torch.equal(loaded[name], tensor)}
    warned = {f"base_model.model.{path}" for warning in plan.warnings for path in warning.sites}
    assert lost == warned
    assert bool(lost) is any_lost


def test_only_lora_is_renamed() -> None:
    found = gk.survey("laguna")
    assert gk.plan(found, r=2).warnings
    assert gk.plan(found, method="vera", targets=["q_proj", "gate_proj"], r=2).warnings == ()
    assert gk.plan(found, targets=["q_proj", "v_proj"], r=2).warnings == ()


def test_a_backbone_whose_names_are_those_of_another_class_on_disk() -> None:
    (found,) = gk.survey("maskformer").faults
    assert found.fault is Fault.RENAMED_ON_RELOAD
    assert {path.partition(".encoder.layers.")[0] for path in found.sites} == {"pixel_level_module.encoder.model"}


def test_a_class_that_hides_its_input_embeddings() -> None:
    plan = gk.plan("pp_formulanet", allow_unmatched=True)
    (warning,) = plan.warnings
    assert set(warning.sites) == {attached.path for attached in plan.attached}
    assert warning.page == Fault.NO_INPUT_EMBEDDINGS.page
    assert plan.to_dict()["warnings"][0]["page"] in str(plan)


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_its_page(fault: Fault) -> None:
    assert (UPSTREAM / fault.page).is_file()
