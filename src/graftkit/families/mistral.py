"""Mistral: the window that released checkpoints since 0.2 do not have."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    # The class defaults to the window of the first release; mlx-lm and llama.cpp compute without one.
    served_twin=ServedTwin(overrides={"sliding_window": None}),
)
