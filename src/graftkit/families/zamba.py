"""Zamba: one attention block that its hybrid layers share."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

FAMILY = Family(
    name="zamba",
    model_types=("zamba",),
    # From ZambaMambaMixer.forward in transformers.
    bypassed=(Bypassed("*.mamba.conv1d", "the mixer hands conv1d.weight to a causal convolution function"),),
    # A block is only shared where two layers use it.
    twin_overrides={
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
)
