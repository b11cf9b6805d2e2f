"""A merged checkpoint against the exact merge of its base and its adapter."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import by_code

import graftkit as gk
from graftkit.checks.check_merged import check_merged
from graftkit.checks.probes.live_adapter import adapter_parameters
from graftkit.findings import Severity


@dataclass(frozen=True)
class Places:
    base: Path
    adapter: Path
    out: Path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A base in bfloat16, an adapter with an effect, and where the merge goes."""
    model = gk.twin("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = gk.attach(model, gk.plan(model, r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return Places(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def found(places: Places) -> dict[str, gk.Finding]:
    return by_code(check_merged(places.out, places.base, places.adapter))


@pytest.mark.rule_passes("GK606")
def test_gk606_passes_on_a_merge(places: Places) -> None:
    gk.merge(places.base, places.adapter, places.out)
    seen = found(places)
    assert seen["GK606"].severity is Severity.OK
    assert seen["GK606"].evidence["elements"] > 1000
    assert not [f for f in seen.values() if f.severity is Severity.ERROR]


@pytest.mark.rule_fails("GK606")
def test_gk606_pefts_own_merge_in_bfloat16(places: Places) -> None:
    base = type(gk.twin("llama")).from_pretrained(places.base, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, places.adapter, autocast_adapter_dtype=False)
    adapted.to(torch.bfloat16).merge_and_unload().save_pretrained(places.out)
    seen = found(places)["GK606"]
    assert seen.severity is Severity.ERROR
    assert seen.evidence["problems"] > 1


@pytest.mark.rule_fails("GK606")
def test_gk606_a_tensor_that_nobody_should_have_touched(places: Places) -> None:
    gk.merge(places.base, places.adapter, places.out)
    weights = next(places.out.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert found(places)["GK606"].severity is Severity.ERROR


@pytest.mark.rule_fails("GK606")
def test_gk606_the_base_under_another_name(places: Places) -> None:
    shutil.copytree(places.base, places.out)
    assert found(places)["GK606"].severity is Severity.ERROR
