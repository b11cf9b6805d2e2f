"""Output layers that the base may not have: a plan says where the adapter's file would lack them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.unit.checks.live_adapters import with_effect
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import graftkit as gk
from graftkit.checks.probes.forward import difference
from graftkit.planning.decisions import Caution


@pytest.fixture
def classifier(twin_of: Callable[[str], nn.Module]) -> Any:
    config = copy.deepcopy(twin_of("llama").config)
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def cautions(plan: gk.Plan) -> list[tuple[Caution, tuple[str, ...]]]:
    return [(warning.caution, warning.sites) for warning in plan.warnings]


@pytest.mark.parametrize("targets", ["attention", ["attention", "score"]])
def test_a_head_that_the_adapter_does_not_hold(targets: Any, classifier: Any) -> None:
    assert cautions(gk.plan(classifier, targets=targets, r=2)) == [(Caution.HEAD_NOT_SAVED, ("score",))]


def test_the_advice_saves_it(classifier: Any, tmp_path: Path) -> None:
    plan = gk.plan(copy.deepcopy(classifier), targets="attention", r=2, modules_to_save=["score"])
    assert not plan.warnings
    adapted = with_effect(gk.attach(copy.deepcopy(classifier), plan)).eval()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        classifier.score.weight.normal_()  # as another process would initialize it
        loaded = PeftModel.from_pretrained(classifier, tmp_path).eval()
        ids = torch.tensor([[1, 5, 7, 3]])
        assert difference(adapted(input_ids=ids).logits, loaded(input_ids=ids).logits) < 1e-5


def test_a_head_of_several_layers_is_saved_by_one_name() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=32, **sizes))
    assert cautions(gk.plan(model, r=2)) == [
        (Caution.HEAD_NOT_SAVED, ("classifier.dense", "classifier.out_proj")),
    ]
    assert not gk.plan(model, r=2, modules_to_save=["classifier"]).warnings


def test_output_embeddings_come_with_the_base(twin_of: Callable[[str], nn.Module]) -> None:
    assert not gk.plan(twin_of("llama"), targets="attention", r=2).warnings


def test_a_head_that_the_files_hold(classifier: Any, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 3
    assert not gk.plan(tmp_path, targets="attention", r=2).warnings
