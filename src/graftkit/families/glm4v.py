"""GLM-4.1V and its relatives: rotary sections that the model assumes where the configuration is silent."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="glm4v",
    model_types=("glm4v_text", "glm_ocr_text", "glm_image_text"),
    # The rotary embedding falls back to sections of 8, 12 and 12 frequencies; the twin's heads have 8 pairs.
    twin_overrides={"rope_parameters": {"mrope_section": [2, 3, 3]}},
)
