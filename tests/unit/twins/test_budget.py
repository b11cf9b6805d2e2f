"""What is searched, built and trained on the way to a twin ends in time, and leaves the machine its memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
import weakref

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from graftkit.errors import BuildError
from graftkit.surveying.sites import Architecture
from graftkit.twins.batches.search import NoRecipe, find_recipe
from graftkit.twins.budget import OverBudgetError, let_go, within
from graftkit.twins.twin import twin

MEGABYTE = 1_000_000


# ---- the meter


def test_a_loop_without_end_is_stopped():
    value = torch.ones(4)
    with pytest.raises(OverBudgetError), within(0.3):
        while True:
            value = value.sin()


def test_code_that_swallows_the_error_gets_it_again():
    def stubborn():
        with contextlib.suppress(Exception):
            while True:
                torch.ones(4).sin()
        torch.ones(4).sin()

    with pytest.raises(OverBudgetError), within(0.3):
        stubborn()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1 << 20, 1 << 14),
        lambda: torch.ones(1 << 17, 1) + torch.ones(1, 1 << 17),
        lambda: torch.ones(1 << 17, 1) @ torch.ones(1, 1 << 17),
        lambda: torch.ones(1, 1).expand(1 << 17, 1 << 17).clone(),
        lambda: torch.ones(8).repeat(1 << 31),
        lambda: torch.nn.functional.pad(torch.ones(2, 2), (1 << 17, 0, 1 << 17, 0)),
        lambda: torch.randn(1 << 20, 1 << 14, generator=torch.Generator()),
    ],
    ids=["made", "broadcast", "outer product", "copied", "repeated", "padded", "drawn"],
)
def test_one_operation_that_is_too_large_does_not_run(make):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OverBudgetError), within(60):
        make()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, "kilobytes"


def test_one_operation_that_is_too_long_does_not_run():
    left, right, product = torch.zeros(8000, 8000), torch.zeros(8000, 8000), torch.ones(8000, 8000)
    with pytest.raises(OverBudgetError), within(1):
        torch.mm(left, right, out=product)
    assert product.min() == 1, "not even a part of it was computed"


def test_what_is_alive_is_counted_and_nothing_else():
    with within(60, memory=10 * MEGABYTE):
        for _ in range(100):
            torch.zeros(MEGABYTE)
        large = torch.zeros(2 * MEGABYTE).expand(100, -1)
    kept = []
    with pytest.raises(OverBudgetError), within(60, memory=10 * MEGABYTE):
        while True:
            kept.append(large[0][:250_000].clone())
    assert len(kept) == 10


def test_what_a_graph_holds_is_counted():
    weight = torch.ones(250_000, requires_grad=True)
    with pytest.raises(OverBudgetError), within(60, memory=10 * MEGABYTE):
        value = weight
        while True:
            value = value.exp()


def test_a_backward_pass_is_counted():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            while True:
                gradient = gradient.sin()

    value = Slow.apply(torch.ones(4, requires_grad=True))
    with pytest.raises(OverBudgetError), within(0.3):
        value.sum().backward()


def test_what_is_on_the_meta_device_weighs_nothing():
    with within(60):
        assert torch.zeros(1 << 20, 1 << 20, device="meta").sum().device.type == "meta"


def test_an_error_that_is_kept_holds_nothing_of_what_was_computed():
    def computes():
        state = torch.zeros(10)
        refs.append(weakref.ref(state))

        def inner():
            raise ValueError(state.shape)

        try:
            inner()
        except ValueError as error:
            raise RuntimeError from error

    refs: list = []
    kept = []
    try:
        computes()
    except RuntimeError as error:
        let_go(error)
        kept.append(error)
    gc.collect()
    assert refs[0]() is None


# ---- a search


class WhateverConfig(PretrainedConfig):
    model_type = "budget_of_the_tests"
    vocab_size = 40
    hidden_size = 8


class Whatever(PreTrainedModel):
    config_class = WhateverConfig

    def __init__(self, config=None):
        super().__init__(config or WhateverConfig())
        self.embed = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.head = nn.Linear(self.config.hidden_size, self.config.hidden_size)
        self.post_init()


class Endless(Whatever):
    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        while True:
            hidden = self.head(hidden)


class Greedy(Whatever):
    def forward(self, input_ids):
        hidden = [self.head(self.embed(input_ids))]
        while True:
            hidden.append(hidden[-1].repeat(2, 1, 1))


class LargeBackward(Whatever):
    """One forward is cheap; what its graph keeps for a backward pass is not."""

    def forward(self, input_ids):
        hidden = self.head(self.embed(input_ids)).repeat(1, 10, 1000)
        for _ in range(200):
            hidden = hidden.relu()
        return {"logits": hidden}


@pytest.mark.parametrize("model_class", [Endless, Greedy])
def test_a_search_on_a_forward_that_never_ends_does(model_class):
    with pytest.raises(NoRecipe) as caught:
        find_recipe(model_class().eval(), seconds=2)
    assert isinstance(caught.value.failure.error, OverBudgetError)


def test_a_backward_pass_that_is_too_large_ends_and_leaves_what_was_found(monkeypatch):
    little = functools.partial(within, memory=100 * MEGABYTE)
    monkeypatch.setattr("graftkit.twins.batches.refine.within", little)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = find_recipe(LargeBackward().eval(), seconds=5)
    assert found.trial.linears == {"head"}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, "kilobytes: of a graph that has 1.5 GB"


def test_failures_do_not_keep_what_failed():
    class Fails(Whatever):
        def forward(self, input_ids):
            hidden = self.head(self.embed(input_ids))
            refs.append(weakref.ref(hidden))
            raise ValueError(hidden.shape)

    refs: list = []
    with pytest.raises(NoRecipe) as caught:
        find_recipe(Fails().eval(), seconds=5)
    assert caught.value.failure is not None
    assert refs
    assert not [ref for ref in refs if ref() is not None]


# ---- a twin


def test_a_twin_that_cannot_be_built_in_its_memory_is_refused():
    class Wide(Whatever):
        def __init__(self, config):
            super().__init__(config)
            length = int(torch.ones(1 << 13).sum())  # the meta device has no values
            self.table = nn.Parameter(torch.ones(length, 1 << 18))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BuildError):
        twin_of(Wide)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def twin_of(model_class):
    """Return the twin of a class of which no full model can be made here."""
    return twin(Architecture(model_class, WhateverConfig()))
