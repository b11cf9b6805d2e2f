"""Models whose class has no forward: they are run, tried and proven through those of their parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import graftkit as gk
from graftkit.errors import BuildError
from graftkit.modeling.entry import parts_to_run, run
from graftkit.modeling.outputs import loss_of, outputs_of
from graftkit.twins.reach import NoGradient, unreached


@pytest.fixture(scope="module")
def bark():
    return gk.twin("bark")


def test_a_model_with_a_forward_has_no_parts_to_run():
    model = gk.twin("llama")
    batch = gk.example_batch(model)
    assert parts_to_run(model) == {}
    assert torch.equal(run(model, batch).logits, model(**batch).logits)


def test_each_part_gets_its_own_inputs(bark):
    batch = gk.example_batch(bark)
    assert batch.keys() == {"semantic", "coarse_acoustics", "fine_acoustics", "codec_model"}
    output = run(bark, batch)
    assert torch.equal(output["semantic"].logits, bark.semantic(**batch["semantic"]).logits)
    assert {path.partition(".")[0] for path in outputs_of(bark, batch)} == set(batch)


def test_a_gradient_reaches_every_part(bark):
    found = unreached(bark, gk.example_batch(bark))
    layers = [path for path in found if ".layers." in path and not path.startswith("codec_model.")]
    assert layers == []
    # Audio that is encoded becomes codes: a choice, through which no gradient goes.
    assert found["codec_model.encoder.layers.0.conv"] is NoGradient.NOT_READ


def test_an_adapter_on_such_a_model_changes_the_outputs_of_its_part(bark):
    batch = gk.example_batch(bark)
    adapted = gk.attach(copy.deepcopy(bark), gk.plan(bark, targets=["attention"]))
    before = outputs_of(adapted, batch)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "semantic" in name and "lora_B" in name:
                weight.fill_(0.1)
    after = outputs_of(adapted, batch)
    assert {path.partition(".")[0] for path in before if not torch.equal(before[path], after[path])} == {
        "semantic"
    }
    assert torch.isfinite(loss_of(adapted, batch))


class Part(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(2, 2)

    def forward(self, input_ids):
        raise ValueError("no part of it runs")


class Whole(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.only = Part(config)


def test_where_no_part_runs_the_error_is_that_of_the_first():
    with pytest.raises(BuildError) as caught:
        gk.example_batch(Whole(PretrainedConfig()))
    assert caught.value.code == "twin"
    assert isinstance(caught.value.__cause__, BuildError)
