"""In what a twin is built otherwise than the full model is found, and brought back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, PretrainedConfig, PreTrainedModel

from graftkit.surveying.sources.build import build_on_meta
from graftkit.twins.description import describe_twin
from graftkit.twins.faithful.differences import differences
from graftkit.twins.faithful.keep_structure import keep_structure
from graftkit.twins.remembered import forget
from graftkit.twins.shrink import shrink
from graftkit.twins.twin import twin


def _stack(*kinds):
    return nn.ModuleDict({"layers": nn.ModuleList(kinds)})


class _Tied(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight


LINEAR, NORMED = nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
UNLIKE = {
    "a class of modules": (_stack(LINEAR, nn.LayerNorm(4)), _stack(LINEAR, LINEAR)),
    "a module inside": (_stack(NORMED), _stack(nn.Sequential(nn.LayerNorm(4)))),
    "a kind of layer": (
        _stack(nn.ModuleDict({"a": LINEAR, "b": LINEAR}), nn.ModuleDict({"a": LINEAR})),
        _stack(nn.ModuleDict({"a": LINEAR, "b": LINEAR})),
    ),
    "a bias": (_stack(LINEAR), _stack(nn.Linear(4, 4, bias=False))),
    "a tie": (_Tied(tied=True), _Tied(tied=False)),
    "depthwise channels": (_stack(nn.Conv1d(4, 4, 3, groups=4)), _stack(nn.Conv1d(4, 4, 3))),
    "grouped channels": (_stack(nn.Conv1d(4, 4, 3, groups=2)), _stack(nn.Conv1d(4, 4, 3, groups=4))),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_lost_is_found_and_so_is_what_is_added(name):
    full, other = UNLIKE[name]
    lost, added = differences(full, other), differences(other, full)
    assert any(difference.lost for difference in lost)
    assert {(one.aspect, one.what, one.lost) for one in lost} == {
        (one.aspect, one.what, not one.lost) for one in added
    }


@pytest.mark.parametrize(
    ("full", "other"),
    [
        pytest.param(_stack(*[LINEAR] * 9), _stack(LINEAR), id="numbers of layers"),
        pytest.param(_stack(nn.Linear(64, 64)), _stack(nn.Linear(4, 4)), id="widths"),
        pytest.param(
            nn.ModuleDict({f"expert_{n}": LINEAR for n in range(128)}),
            nn.ModuleDict({f"expert_{n}": LINEAR for n in range(4)}),
            id="experts by name",
        ),
    ],
)
def test_how_often_and_how_wide_is_no_difference(full, other):
    assert differences(full, other) == ()


def test_a_lost_projection_is_brought_back_by_the_width_that_it_needs():
    config = ElectraConfig()
    full = build_on_meta(config, ElectraForMaskedLM)
    without = {"embedding_size": 64, "hidden_size": 64}
    assert differences(full, build_on_meta(shrink(config, without), ElectraForMaskedLM))
    assert keep_structure(full).kept == frozenset()


class EdgesConfig(PretrainedConfig):
    model_type = "faithful_edges"

    def __init__(self, hidden_size=96, num_hidden_layers=8, vocab_size=1000, **kwargs):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Edges(PreTrainedModel):
    """A stack whose first and last layers are of another kind, which nothing in its configuration tells."""

    config_class = EdgesConfig

    def __init__(self, config):
        super().__init__(config)
        width, last = config.hidden_size, config.num_hidden_layers - 1
        self.embed = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(
            nn.Linear(width, width, bias=number in {0, last}) for number in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def test_a_kind_of_layer_that_no_field_tells_is_brought_back_by_one_more_layer():
    found = keep_structure(build_on_meta(EdgesConfig(), Edges))
    assert found.kept == {"num_hidden_layers[:3]"}
    assert found.differs == ()


def test_the_twin_has_it():
    with torch.device("meta"):
        full = Edges(EdgesConfig())
    model = twin(full)
    described = describe_twin(model)
    assert [layer.bias is not None for layer in model.layers] == [True, False, True]
    assert (described.kept, described.differs, described.runs) == (("num_hidden_layers[:3]",), (), True)


def test_what_cannot_be_brought_back_is_named():
    with torch.device("meta"):
        full = Edges(EdgesConfig())
    forget(Edges)
    described = describe_twin(twin(full, overrides={"num_hidden_layers": 2}))
    assert described.differs
    assert described.to_dict()["differs"] == list(described.differs)
