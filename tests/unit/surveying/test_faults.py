"""Faults of PEFT and transformers are found on a model's structure, and are what PEFT then really does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("laguna", {r"\.shared_experts\.": ".shared_expert."}),
        ("mistral_large4_text", {r"\.mlp\.(gate|experts|shared_experts)\.": r".\1."}),
    ],
)
def test_names_that_peft_is_given_for_those_in_the_file_lead_back(
    tmp_path: Path, twin_of: Callable[[str], nn.Module], name: str, mapping: dict[str, str]
) -> None:
    twin = twin_of(name)
    plan = gk.plan(twin, targets=["all-linear", "experts"], r=2, allow_unmatched=True)
    adapted = gk.attach(copy.deepcopy(twin), plan)
    with torch.no_grad():
        saved = {n: parameter.normal_() for n, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapted.save_pretrained(tmp_path)
    loaded = dict(PeftModel.from_pretrained(twin, tmp_path, key_mapping=mapping).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


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


@pytest.mark.parametrize("name", ["granite_speech5_ctc", "pp_formulanet"])
def test_stock_peft_adapts_it_while_the_configuration_says_that_no_words_are_tied(
    tmp_path: Path, twin_of: Callable[[str], nn.Module], name: str
) -> None:
    base = twin_of(name).eval()
    batch, before, shared = gk.example_batch(base), dict(vars(base.config)), _shared(base)
    with pytest.raises(NotImplementedError):
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    adapted = gk.attach(copy.deepcopy(base), gk.plan(base, targets="all-linear", r=2))
    assert vars(adapted.get_base_model().config) == before
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1) if parameter.requires_grad else parameter
    adapted.save_pretrained(tmp_path / "adapter")

    fresh = copy.deepcopy(base)
    tied = getattr(fresh.config, "tie_word_embeddings", True)
    fresh.config.tie_word_embeddings = False
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    fresh.config.tie_word_embeddings = tied
    expected = adapted.eval()(**batch)[0]
    assert torch.equal(loaded(**batch)[0], expected)

    merged = loaded.merge_and_unload()
    assert _shared(merged) == shared
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert _shared(again) == shared
    torch.testing.assert_close(again(**batch)[0], expected, atol=1e-4, rtol=1e-4)


def _shared(model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_its_page(fault: Fault) -> None:
    assert (UPSTREAM / fault.page).is_file()
