"""GLM-4.5V: rotary sections that the model assumes where the configuration is silent."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="glm4v_moe",
    model_types=("glm4v_moe_text",),
    # As in GLM-4.1V, and half of each head rotates: four pairs of the twin's head size of 16.
    twin_overrides={"rope_parameters": {"mrope_section": [2, 1, 1]}},
)
