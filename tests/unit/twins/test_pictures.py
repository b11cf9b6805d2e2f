"""Pictures, clips and convolutional stages of twins: small, and small once more as they are."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from graftkit.twins.shrink import shrink
from graftkit.twins.twin import twin

TYPES = ["align", "depth_pro", "efficientnet", "tvp", "videomae", "videoprism", "vivit", "vjepa2"]


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_small_is_shrunk_no_further(model_type):
    """What a twin's plan reads from the table of known twins depends on it."""
    small = shrink(CONFIG_MAPPING[model_type]())
    assert shrink(small).to_dict() == small.to_dict()


@pytest.mark.parametrize("model_type", ["align", "efficientnet"])
def test_scaled_stages_have_two_blocks_each_and_join_what_follows(model_type):
    config = shrink(CONFIG_MAPPING[model_type]())
    stages = getattr(config, "vision_config", config)
    assert (stages.width_coefficient, stages.depth_coefficient, max(stages.num_block_repeats)) == (0.25, 1.0, 2)
    assert stages.hidden_dim == 4 * stages.out_channels[-1] * stages.width_coefficient
    if stages is not config:
        assert config.projection_dim == stages.out_channels[-1] * stages.width_coefficient


def test_tubes_decide_the_picture_and_the_clip():
    vision = shrink(CONFIG_MAPPING["videoprism"]()).vision_config
    assert (vision.image_size, vision.num_frames) == (4 * 18, 8)
    assert shrink(CONFIG_MAPPING["vjepa2"]()).crop_size == 4 * 16


def test_a_picture_and_the_frame_around_it_keep_their_proportion():
    config = shrink(CONFIG_MAPPING["tvp"]())
    assert (config.max_img_size, config.visual_prompt_size) == (448 // 4, 96 // 4)


def test_towers_read_pictures_as_large_as_the_patches_of_the_whole():
    config = shrink(CONFIG_MAPPING["depth_pro"]())
    parts = [config.image_model_config, config.patch_model_config, config.fov_model_config]
    assert {part.image_size for part in parts} == {config.patch_size} == {4 * 14}
    assert config.intermediate_hook_ids == [1, 0], "the last layer first, as in the full model"


@pytest.mark.parametrize("model_type", ["align", "depth_pro", "vjepa2"])
def test_their_twins_are_small(model_type):
    assert sum(parameter.numel() for parameter in twin(model_type).parameters()) < 25_000_000
