"""Where shrinking goes too far, the ladder shrinks less: as little less as it takes."""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from graftkit.errors import BuildError
from graftkit.twins.description import describe_twin
from graftkit.twins.example_batch import Searched
from graftkit.twins.ladder import Ladder, TooLargeError, named_fields
from graftkit.twins.shrink import changed_fields, shrink
from graftkit.twins.twin import twin


class TowerConfig(PretrainedConfig):
    model_type = "ladder_tower"

    def __init__(self, hidden_size=96, intermediate_size=384, num_hidden_layers=6, **kwargs):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class PairConfig(PretrainedConfig):
    model_type = "ladder_pair"
    sub_configs: ClassVar = {"text_config": TowerConfig, "vision_config": TowerConfig}
    attribute_map: ClassVar = {"width": "projection_dim"}

    def __init__(self, text_config=None, vision_config=None, projection_dim=192, **kwargs):
        self.text_config = TowerConfig(**(text_config or {}))
        self.vision_config = TowerConfig(**(vision_config or {}))
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


class Pair(PreTrainedModel):
    """Two stacks of linears; ``forward`` wants what ``wants`` says of the configuration."""

    config_class = PairConfig

    def __init__(self, config):
        super().__init__(config)
        for name in ("text", "vision"):
            part = getattr(config, f"{name}_config")
            layers = (nn.Linear(part.hidden_size, part.hidden_size) for _ in range(part.num_hidden_layers))
            self.add_module(name, nn.Sequential(*layers))
        self.post_init()

    def _init_weights(self, module):
        pass


def _ladder(wants, *, config=None, overrides=None, steps=None, seconds=30.0):
    """A ladder on which a batch runs where ``wants(configuration)`` says so, by raising."""
    config = config or PairConfig()

    def build(kept):
        return Pair(shrink(config, overrides, kept=kept))

    def find_batch(model, _seconds):
        try:
            wants(model.config)
        except ValueError as error:
            raise BuildError("no batch", code="twin") from error
        return Searched({"x": torch.zeros(1)})

    on_progress = None if steps is None else steps.append
    return Ladder(config, build, find_batch, overrides, on_progress=on_progress, seconds=seconds)


def _refuse(message, *, when):
    if when:
        raise ValueError(message)


def test_nothing_is_kept_where_nothing_has_to_be():
    climbed = _ladder(lambda config: None).climb()
    assert climbed.kept == frozenset()
    assert climbed.runs


def test_a_field_that_the_error_names_is_kept_in_the_part_that_needs_it():
    def wants(config):
        _refuse("hidden_size must be a multiple of 3", when=config.vision_config.hidden_size % 3)

    climbed = _ladder(wants).climb()
    assert climbed.kept == {"vision_config.hidden_size"}
    assert climbed.model.config.vision_config.hidden_size == 96
    assert climbed.model.config.text_config.hidden_size == 64


def test_a_field_is_known_by_the_name_that_code_has_for_it():
    def wants(config):
        _refuse("the width is wrong", when=config.width != 192)

    assert _ladder(wants).climb().kept == {"projection_dim"}


def test_a_field_in_the_line_that_raised_is_found():
    config = shrink(PairConfig())
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(config.text_config.intermediate_size).view(3, 128)
    found = named_fields(PairConfig(), caught.value, frozenset(changed_fields(PairConfig())))
    assert found == {"text_config.intermediate_size", "vision_config.intermediate_size"}


def test_one_error_after_the_other_is_followed():
    def wants(config):
        _refuse("hidden_size", when=config.vision_config.hidden_size % 3)
        _refuse("intermediate_size", when=config.text_config.intermediate_size % 3)

    assert _ladder(wants).climb().kept == {"vision_config.hidden_size", "text_config.intermediate_size"}


def test_layers_are_kept_where_the_error_is_about_layers():
    def wants(config):
        _refuse("layer 4 is not there", when=config.text_config.num_hidden_layers < 5)

    climbed = _ladder(wants).climb()
    assert climbed.kept == {"text_config.num_hidden_layers"}
    assert len(climbed.model.text) == 6
    assert len(climbed.model.vision) == 2


@pytest.mark.parametrize(
    ("field", "kept"),
    [
        ("text_config.hidden_size", "text_config.*"),
        ("vision_config.hidden_size", "vision_config.*"),
        ("projection_dim", ".*"),
    ],
)
def test_without_a_name_one_part_after_the_other_keeps_its_widths(field, kept):
    def wants(config):
        value = functools.reduce(getattr, field.split("."), config)
        _refuse("?", when=value % 3)

    assert _ladder(wants).climb().kept == {kept}


def test_then_everything_but_the_layers_then_these_too():
    def several(config):
        parts = (config.text_config.hidden_size, config.vision_config.hidden_size)
        _refuse("?", when=any(size % 3 for size in parts))

    def deep(config):
        _refuse("?", when=config.text_config.num_hidden_layers < 6)

    assert _ladder(several).climb().kept == {"*"}
    assert _ladder(deep).climb().kept == {"**"}


def test_the_overrides_of_the_user_hold_on_every_step():
    seen = []

    def wants(config):
        seen.append(config.text_config.hidden_size)
        _refuse("hidden_size", when=config.vision_config.hidden_size % 3)

    _ladder(wants, overrides={"text_config": {"hidden_size": 48}}).climb()
    assert set(seen) == {48}


def test_where_nothing_runs_the_smallest_that_builds_is_returned():
    climbed = _ladder(lambda config: _refuse("?", when=True)).climb()
    assert climbed.kept == frozenset()
    assert climbed.runs is False


def test_where_nothing_builds_the_first_error_is_raised():
    errors = []

    def build(kept):
        errors.append(BuildError(f"refused {sorted(kept)}", code="twin"))
        raise errors[-1]

    with pytest.raises(BuildError) as caught:
        Ladder(PairConfig(), build, lambda model, seconds: {}).climb()
    assert caught.value is errors[0]
    assert len(errors) == 6, "nothing, two parts, the configuration itself, all widths, everything"


def test_what_is_large_when_shrunk_is_refused_at_once():
    builds = []

    def build(kept):
        builds.append(kept)
        raise TooLargeError("large")

    with pytest.raises(TooLargeError):
        Ladder(PairConfig(), build, lambda model, seconds: {}).climb()
    assert builds == [frozenset()]


def test_the_climb_ends_in_time_and_is_told():
    steps = []
    climbed = _ladder(lambda config: _refuse("?", when=True), steps=steps, seconds=0.0).climb()
    assert climbed.model is not None
    assert [step.done for step in steps] == [0]


class Picky(PreTrainedModel):
    """A language model whose hidden size must be a multiple of three."""

    config_class = TowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        width = config.hidden_size
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.view(*hidden.shape[:-1], 3, self.config.hidden_size // 3)


def test_a_live_model_of_an_unknown_class_gets_a_twin_that_runs():
    model = twin(Picky(TowerConfig(vocab_size=1000)))
    described = describe_twin(model)
    assert (described.kept, described.runs) == (("hidden_size",), True)
    assert model.config.hidden_size == 96
    assert len(model.layers) == 2


def test_a_twin_on_which_nothing_runs_says_so():
    class Unfeedable(Picky):
        def forward(self, what):
            return {}

    assert describe_twin(twin(Unfeedable(TowerConfig(vocab_size=1000)))).runs is False
