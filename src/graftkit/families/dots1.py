"""dots.llm1: experts that its class needs, and its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="dots1",
    model_types=("dots1",),
    # Dots1TopkRouter is built in every layer after the dense ones.
    twin_overrides={"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
)
