"""What the search finds for classes whose inputs are out of the ordinary, without any table."""

from __future__ import annotations

import pytest

from graftkit.twins.batches.repairs import given
from graftkit.twins.batches.search import find_recipe
from graftkit.twins.batches.trial import is_linear
from graftkit.twins.twin import twin


@pytest.mark.parametrize(
    ("model_type", "inputs"),
    [
        ("pix2struct", {"flattened_patches"}),
        ("seggpt", {"pixel_values", "prompt_pixel_values", "prompt_masks"}),
        ("pi0", {"state", "input_ids", "pixel_values", "pixel_attention_mask"}),
        ("qwen2_5_omni_thinker", {"input_ids", "position_ids", "pixel_values", "input_features"}),
        ("muse_glimmer_assistant", {"noise_embeds", "context_hidden_states", "attention_mask"}),
    ],
    ids=[
        "numbered patches",
        "an image beside its prompt",
        "images that may be padding",
        "positions",
        "more keys than queries",
    ],
)
def test_every_linear_is_reached(model_type, inputs):
    model = twin(model_type)
    found = find_recipe(model)
    assert inputs <= given(found.recipe).keys()
    assert found.trial.linears == {path for path, module in model.named_modules() if is_linear(module)}
