"""NLLB-MoE: experts that transformers never runs."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

# docs/upstream/transformers_nllb_moe_experts.md: a one-hot mask is read as indices of experts, which are 0 and 1.
_NEVER = "transformers runs the first two experts of a layer alone, whatever the router chose"

FAMILY = Family(
    name="nllb_moe",
    model_types=("nllb-moe",),
    bypassed=tuple(
        Bypassed(f"*.experts.expert_{number}*.{linear}", _NEVER)
        for number in ("[2-9]", "[0-9][0-9]")
        for linear in ("fc1", "fc2")
    ),
)
