"""A recipe makes the same kind of batch for every size of a class."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from graftkit.twins.batches.recipe import is_recipe, make_batch, text_ids
from graftkit.twins.batches.search import find_recipe
from graftkit.twins.example_batch import example_batch
from graftkit.twins.twin import twin

LLAVA = {
    "image": {
        "pixel_values": "normal(B, 3, vision_config.image_size, vision_config.image_size)",
        "placeholders": "[image_token_index] * features",
    },
    "text": {"input_ids": "tokens(6)", "attention_mask": "ones(B, T)", "labels": "targets()"},
    "other": {"use_cache": "False"},
}


@pytest.fixture(scope="module")
def llava():
    return twin("llava")


def _make(recipe, model, *, rows=2, seed=0, **wanted):
    return make_batch(recipe, model, rows, torch.Generator().manual_seed(seed), **wanted)


def test_placeholders_are_as_many_as_features_and_carry_no_label(llava):
    batch = _make(LLAVA, llava, rows=3)
    features = llava.get_image_features(batch["pixel_values"]).pooler_output
    soft = batch["input_ids"] == llava.config.image_token_index
    assert batch["input_ids"].shape == (3, 6 + features[0].shape[0])
    assert (soft.sum(1) == features[0].shape[0]).all()
    assert (batch["labels"][soft] == -100).all()
    assert torch.equal(batch["labels"][~soft], batch["input_ids"][~soft])
    assert torch.isfinite(llava(**batch).loss)


def test_the_same_recipe_fits_another_size():
    larger = twin("llava", overrides={"vision_config": {"image_size": 84}, "text_config": {"hidden_size": 96}})
    batch = _make(LLAVA, larger)
    assert batch["pixel_values"].shape[-2:] == (84, 84)
    assert torch.isfinite(larger(**batch).loss)


def test_a_modality_that_is_not_wanted_leaves_no_placeholders(llava):
    batch = _make(LLAVA, llava, modalities=frozenset({"text"}))
    assert "pixel_values" not in batch
    assert batch["input_ids"].shape == (2, 6)
    assert not (batch["labels"] == -100).any()


def test_a_modality_whose_part_the_model_lacks_is_left_out():
    from transformers import Gemma4Config

    from graftkit.families import geometry

    without_audio = twin(Gemma4Config.from_dict(dict(geometry("google/gemma-4-31B"))))
    recipe = {
        "audio": {"input_features": "normal(B, 8, audio_config.hidden_size)"},
        "text": {"input_ids": "tokens(4)"},
    }
    assert set(_make(recipe, without_audio)) == {"input_ids"}


def test_the_seed_decides(llava):
    first, again, other = (_make(LLAVA, llava, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_flags_are_not_tensors(llava):
    assert _make(LLAVA, llava)["use_cache"] is False


@pytest.mark.parametrize("model_type", ["qwen3_vl", "whisper", "t5", "vit"])
def test_a_recipe_that_was_found_has_no_number_that_a_field_states(model_type):
    """Twins of two sizes, one recipe: what the search found on the small one runs on the other."""
    small = twin(model_type)
    overrides = {"t5": {"d_model": 96}, "whisper": {"num_mel_bins": 40}, "vit": {"image_size": 96}}
    larger = twin(model_type, overrides=overrides.get(model_type, {"vision_config": {"patch_size": 8}}))
    recipe = find_recipe(small).recipe
    with torch.no_grad():
        larger(**_make(recipe, larger))


@pytest.mark.parametrize("value", [None, [], {"text": None}, {"text": {"input_ids": 3}}, "text"])
def test_other_json_is_no_recipe(value):
    assert not is_recipe(value)
    assert is_recipe(LLAVA)


@pytest.mark.parametrize("seed", range(8))
def test_a_word_is_no_placeholder_by_chance(seed):
    """The ids of this family's placeholders lie in the middle of its twin's vocabulary."""
    model = twin("exaone4_5")
    batch = example_batch(model, batch_size=8, seed=seed)
    assert torch.isfinite(model(**batch).loss)


def test_words_are_of_the_longest_range_without_special_tokens():
    config = LlamaConfig(vocab_size=100, bos_token_id=1, eos_token_id=[2, 30], pad_token_id=90)
    assert text_ids(config) == (31, 90)
    assert text_ids(LlamaConfig(vocab_size=3, bos_token_id=1, eos_token_id=2, pad_token_id=0)) == (0, 3)
