"""Jamba: weights that its Mamba mixer reads past their modules."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

# From JambaMambaMixer.forward in transformers: it normalises B, C and the time step between the projections,
# so the fused kernel of Mamba does not apply and out_proj and x_proj are called as modules.
FAMILY = Family(
    name="jamba",
    model_types=("jamba",),
    bypassed=(
        Bypassed("*.mamba.conv1d", "the mixer hands conv1d.weight to a causal convolution function"),
        Bypassed("*.mamba.dt_proj", "the mixer multiplies by dt_proj.weight itself, unless it is quantized"),
    ),
)
