"""Example batches: complete, labelled where it matters, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from graftkit.errors import BuildError
from graftkit.families import geometry
from graftkit.twins.example_batch import example_batch
from graftkit.twins.twin import twin


@pytest.fixture(scope="module")
def e4b():
    from transformers import Gemma4Config

    return twin(Gemma4Config.from_dict(dict(geometry("google/gemma-4-E4B-it"))))


def test_every_tensor_is_batched_and_on_the_model(case, twin_of_case):
    batch = example_batch(twin_of_case, batch_size=3)
    assert torch.isfinite(twin_of_case(**batch).loss)
    assert all(value.device == twin_of_case.device for value in batch.values())
    assert all(v.dtype == twin_of_case.dtype for v in batch.values() if v.is_floating_point())


def test_the_same_seed_gives_the_same_batch(twin_of_case):
    first, again, other = (example_batch(twin_of_case, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_placeholders_carry_no_label(e4b):
    batch = example_batch(e4b)
    config = e4b.config
    soft = torch.isin(batch["input_ids"], torch.tensor([config.image_token_id, config.audio_token_id]))
    assert soft.any()
    assert (batch["labels"][soft] == -100).all()
    assert torch.equal(batch["labels"][~soft], batch["input_ids"][~soft])


def test_gemma4_feeds_image_and_audio(e4b):
    batch = example_batch(e4b)
    assert {"pixel_values", "image_position_ids", "input_features", "input_features_mask"} <= batch.keys()
    assert set(batch["mm_token_type_ids"].unique().tolist()) == {0, 1, 3}


@pytest.mark.parametrize(
    ("modalities", "absent", "silent"),
    [
        (["text"], {"pixel_values", "input_features"}, ("vision_tower", "audio_tower")),
        (["text", "image"], {"input_features"}, ("audio_tower",)),
        (["text", "audio"], {"pixel_values"}, ("vision_tower",)),
    ],
    ids=["text", "text+image", "text+audio"],
)
def test_modalities_left_out_leave_their_tower_silent(e4b, modalities, absent, silent):
    e4b.zero_grad(set_to_none=True)
    batch = example_batch(e4b, modalities=modalities)
    assert not absent & batch.keys()
    e4b(**batch).loss.backward()
    fed = {n for n, p in e4b.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert fed
    assert not [name for name in fed if any(tower in name for tower in silent)]


def test_unknown_modalities_are_refused(e4b):
    with pytest.raises(BuildError, match="smell") as caught:
        example_batch(e4b, modalities=["smell"])
    assert caught.value.code == "twin"


def test_training_mode_is_left_as_it_was(e4b):
    e4b.train()
    try:
        example_batch(e4b)
        assert all(module.training for module in e4b.modules())
    finally:
        e4b.eval()


# PEFT reads a property of transformers models that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_is_unwrapped():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config

    adapted = get_peft_model(twin(Qwen3Config()), LoraConfig(target_modules=["q_proj"]))
    assert torch.isfinite(adapted(**example_batch(adapted)).loss)


def test_a_model_that_no_batch_is_known_for_is_an_error_with_a_way_out():
    from transformers import PretrainedConfig, PreTrainedModel

    class Closed(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, input_ids):
            raise ValueError("closed")

    with pytest.raises(BuildError) as caught:
        example_batch(Closed(PretrainedConfig()))
    assert caught.value.code == "twin"
    assert "Closed" in caught.value.what
    assert isinstance(caught.value.__cause__, ValueError)
