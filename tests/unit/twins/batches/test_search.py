"""The search on architectures that no table can know: classes of this file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from graftkit.twins.batches.repairs import given
from graftkit.twins.batches.search import NoRecipe, find_recipe
from graftkit.twins.example_batch import example_batch


class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_the_tests"
    vocab_size = 40
    hidden_size = 8
    patch_size = 4
    num_mel_bins = 10
    image_token_id = 39
    num_experts = 4


class Tiny(PreTrainedModel):
    """What its subclasses share: a table of tokens and a head."""

    config_class = TinyConfig

    def __init__(self, config=None):
        super().__init__(config or TinyConfig())
        width = self.config.hidden_size
        self.embed = nn.Embedding(self.config.vocab_size, width)
        self.head = nn.Linear(width, self.config.vocab_size)
        self.parts()

    def parts(self):
        pass


class Output(dict):
    """A model's output: attributes are items."""

    __getattr__ = dict.get


class FiveAxes(Tiny):
    """Images with an axis of frames, of a size that it insists on."""

    def parts(self):
        self.patches = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, pixel_values):
        _, _, _, height, width = pixel_values.shape
        if (height, width) != (32, 32):
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model (32*32).")
        seen = self.patches(pixel_values.flatten(0, 1)).flatten(2).mean(-1)
        return Output(logits=self.head(seen))


class CountsPlaceholders(Tiny):
    """Text with as many placeholders as there are patches, which only its error tells."""

    def parts(self):
        self.projector = nn.Linear(48, 8)

    def forward(self, input_ids, pixel_values=None, labels=None):
        hidden = self.embed(input_ids)
        if pixel_values is not None:
            patches = nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
            soft = input_ids == self.config.image_token_id
            if soft.sum() != patches.shape[0] * patches.shape[1]:
                found = patches.shape[0] * patches.shape[1]
                raise ValueError(f"features and tokens do not match: tokens: {soft.sum()}, features: {found}")
            hidden = hidden.masked_scatter(soft[..., None], self.projector(patches))
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits)


class UnstatedWidth(Tiny):
    """A spectrogram whose bins no field states."""

    def parts(self):
        self.listen = nn.Linear(13, 8)

    def forward(self, input_features):
        return Output(logits=self.head(self.listen(input_features)))


class WantsAnEncoder(Tiny):
    """Cross-attention that is silent without an encoder's states."""

    def parts(self):
        self.cross = nn.Linear(8, 8)

    def forward(self, input_ids, encoder_hidden_states=None):
        hidden = self.embed(input_ids)
        if encoder_hidden_states is not None:
            hidden = hidden + self.cross(encoder_hidden_states).mean(1, keepdim=True)
        return Output(logits=self.head(hidden))


class RareExpert(Tiny):
    """Experts in a list, of which one is for a single token of the vocabulary."""

    def parts(self):
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        rare = input_ids == 7
        for chosen, expert in zip((~rare, rare), self.experts, strict=True):
            if chosen.any():
                hidden = hidden + chosen[..., None] * expert(hidden)
        return Output(logits=self.head(hidden))


class Guarded(Tiny):
    """An optional input that it cannot do without, which its error does not name."""

    def forward(self, input_ids, styles=None):
        """
        Args:
            styles (`torch.LongTensor` of shape `(batch_size, sequence_length)`): of each token.
        """
        if styles is None:
            raise ValueError("how is it to be said?")
        return Output(logits=self.head(self.embed(input_ids) + self.embed(styles)))


class Undocumented(Tiny):
    """A required input of which nothing tells what it is, and that must be long."""

    def parts(self):
        self.listen = nn.Conv1d(5, 8, 9, stride=4)
        self.hear = nn.Conv1d(8, 8, 9)

    def forward(self, states):
        return Output(logits=self.head(self.hear(self.listen(states)).transpose(1, 2)))


class OwnNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden):
        return self.weight * hidden


class NormsFirst(Tiny):
    """A norm of its own, as wide as nothing that it documents."""

    def parts(self):
        self.norm = OwnNorm(8)

    def forward(self, noise_embeds):
        """
        Args:
            noise_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, dim)`): noise.
        """
        return Output(logits=self.head(self.norm(noise_embeds)))


class AddsSound(Tiny):
    """A text and a sound that are added, step by step."""

    def parts(self):
        self.listen = nn.Linear(10, 8)

    def forward(self, input_ids, input_features):
        return Output(logits=self.head(self.embed(input_ids) + self.listen(input_features)))


class WaveAndSpectrogram(Tiny):
    """The same sound twice, each form with a mask of its length."""

    def parts(self):
        self.waves = nn.Conv1d(1, 8, 4, stride=4)
        self.listen = nn.Linear(10, 8)

    def forward(self, input_values, input_features, padding_mask=None, input_features_mask=None):
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, 1, samples)`): a wave.
            input_features (`torch.FloatTensor` of shape `(batch_size, bins, frames)`): its spectrogram.
            padding_mask (`torch.LongTensor` of shape `(batch_size, 1, samples)`): of the wave.
            input_features_mask (`torch.LongTensor` of shape `(batch_size, frames)`): of the spectrogram.
        """
        heard = self.waves(input_values * padding_mask).transpose(1, 2)
        return Output(logits=self.head(heard + self.listen(input_features) * input_features_mask[..., None]))


class KeepsState(Tiny):
    """A state that is changed in place, where it is kept at all."""

    def forward(self, input_ids, use_cache=True):
        hidden = self.embed(input_ids)
        state = hidden.new_zeros(hidden.shape[0], hidden.shape[-1])
        seen = []
        for step in hidden.unbind(1):
            seen.append(step * state)
            if use_cache:
                state += step.sigmoid()
            else:
                state = state + step.sigmoid()
        return Output(logits=self.head(torch.stack(seen, 1)))


class Experts(nn.Module):
    """Stacked matrices, one an expert, of which each token goes through one."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, 8, 8))

    def forward(self, hidden, chosen):
        return torch.einsum("btd,btde->bte", hidden, self.weight[chosen])


class RareStackedExpert(Tiny):
    """As many experts as a short text has tokens, each for its own tokens of the vocabulary."""

    def parts(self):
        self.experts = Experts(12)

    def forward(self, input_ids):
        hidden = self.experts(self.embed(input_ids), input_ids % 12)
        return Output(logits=self.head(hidden))


class MarksSome(Tiny):
    """Each position goes through one of two linears, as a mask says: all ones trains no more of them than none."""

    def parts(self):
        self.near, self.far = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, far_mask=None):
        """
        Args:
            far_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`): which positions see all.
        """
        hidden = self.embed(input_ids)
        near = self.near(hidden)
        if far_mask is not None:
            near = torch.where(far_mask[..., None] == 1, self.far(hidden), near)
        return Output(logits=self.head(near))


class Closed(Tiny):
    def forward(self, input_ids):
        raise ValueError("nothing runs here")


def _found(model_class):
    torch.manual_seed(0)
    model = model_class().eval()
    return model, find_recipe(model, seconds=10)


def test_axes_and_sizes_are_tried():
    model, found = _found(FiveAxes)
    batch = example_batch(model)
    assert batch["pixel_values"].ndim == 5
    assert found.trial.linears == {"head"}


def test_placeholders_are_counted_by_what_the_error_says():
    _, found = _found(CountsPlaceholders)
    assert "projector" in found.trial.linears
    assert found.recipe["image"]["placeholders"].startswith("[image_token_id] * ")
    assert found.trial.has_loss
    assert not found.unfed


def test_a_width_that_no_field_states_is_that_of_the_weight():
    model, found = _found(UnstatedWidth)
    assert 'inputs_of("listen")' in given(found.recipe)["input_features"]
    assert example_batch(model)["input_features"].shape[-1] == 13


def test_an_optional_input_is_given_where_that_reaches_more():
    _, found = _found(WantsAnEncoder)
    assert found.trial.linears == {"cross", "head"}


def test_the_text_is_long_enough_for_every_expert():
    _, found = _found(RareExpert)
    assert {"experts.0", "experts.1"} <= found.trial.linears


def test_an_input_is_given_on_whose_absence_an_error_depends():
    _, found = _found(Guarded)
    assert given(found.recipe)["styles"].endswith("B, T)")


def test_what_nothing_tells_of_is_found_by_what_its_layers_take():
    model, _ = _found(Undocumented)
    states = example_batch(model)["states"]
    assert states.ndim == 3
    assert states.shape[1] == 5


def test_a_norm_of_the_models_own_says_how_wide_its_input_is():
    model, _ = _found(NormsFirst)
    assert example_batch(model)["noise_embeds"].shape[-1] == 8


def test_a_text_is_as_long_as_the_sound_that_is_added_to_it():
    model, found = _found(AddsSound)
    batch = example_batch(model)
    assert batch["input_ids"].shape[1] == batch["input_features"].shape[1]
    assert found.trial.linears == {"listen", "head"}


def test_a_wave_goes_with_its_spectrogram(monkeypatch):
    monkeypatch.setattr(TinyConfig, "hop_length", 4, raising=False)
    model, _ = _found(WaveAndSpectrogram)
    batch = example_batch(model)
    assert batch["input_values"].shape == batch["padding_mask"].shape
    assert batch["input_features"].shape[:2] == batch["input_features_mask"].shape
    assert batch["input_values"].shape[-1] == 4 * batch["input_features"].shape[1]


def test_a_state_is_not_kept_where_a_backward_pass_needs_it_unchanged():
    model, found = _found(KeepsState)
    assert given(found.recipe)["use_cache"] == "False"
    model(**example_batch(model)).logits.sum().backward()


def test_every_stacked_expert_is_chosen_in_whatever_text_is_drawn():
    """A gradient does not show it: one expert that is chosen gives the whole stack one."""
    model, found = _found(RareStackedExpert)
    for seed in range(5):
        assert set((example_batch(model, seed=seed)["input_ids"] % 12).flatten().tolist()) == set(range(12))
    assert found.trial.linears == {"head"}


def test_an_input_that_reaches_more_is_kept_until_it_trains_more():
    model, found = _found(MarksSome)
    assert found.trial.linears == {"near", "far", "head"}
    assert set(example_batch(model)["far_mask"].unique().tolist()) == {0, 1}


def test_a_failure_says_where_the_models_own_code_failed():
    class Fails(Tiny):
        def forward(self, input_ids):
            return self.embed(input_ids).view(7, 11, 13)

    with pytest.raises(NoRecipe) as caught:
        _found(Fails)
    assert caught.value.failure.frames[-1][0] == __file__


def test_where_nothing_runs_the_error_is_the_models():
    with pytest.raises(NoRecipe) as caught:
        _found(Closed)
    assert str(caught.value.failure.error) == "nothing runs here"


def test_the_search_leaves_no_hook_and_no_random_state():
    model = CountsPlaceholders().train()
    before = torch.get_rng_state()
    find_recipe(model, seconds=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_what_was_found_is_not_searched_again(monkeypatch):
    model = CountsPlaceholders().eval()
    first = example_batch(model)

    def no_search(*args, **kwargs):
        raise AssertionError("searched again")

    monkeypatch.setattr("graftkit.twins.example_batch.find_recipe", no_search)
    again = example_batch(model)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_progress_counts_the_linears_that_are_reached():
    steps = []
    find_recipe(CountsPlaceholders().eval(), on_progress=steps.append)
    assert steps[0].done == 0
    assert (steps[-1].done, steps[-1].total) == (2, 2)
