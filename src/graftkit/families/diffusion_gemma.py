"""DiffusionGemma: experts that its class needs, and its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="diffusion_gemma",
    model_types=("diffusion_gemma_text",),
    # DiffusionGemmaTextExperts is built in every layer.
    twin_overrides={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
)
