"""Step 3.7: the window that its class needs, and its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="step3p7",
    model_types=("step3p5",),
    # Its text model makes a sliding mask whatever its layers are (Step3p7TextModel.forward).
    twin_overrides={"sliding_window": 8},
)
