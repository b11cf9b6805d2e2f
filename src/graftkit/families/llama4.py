"""Llama 4: the widths that its vision adapter ties together."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="llama4",
    model_types=("llama4",),
    # The adapter's pixel shuffle folds 1 / pixel_shuffle_ratio ** 2 = 4 patches into one, and its second
    # linear is square (Llama4VisionMLP2), so that these widths follow from the hidden size of 64.
    twin_overrides={
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
)
