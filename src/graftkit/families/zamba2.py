"""Zamba 2: attention blocks that its hybrid layers share, reading two hidden states side by side."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

FAMILY = Family(
    name="zamba2",
    model_types=("zamba2",),
    # As in the other Mamba 2 hybrids (Zamba2MambaMixer.forward).
    bypassed=(
        Bypassed("*mamba.conv1d", "the mixer hands conv1d.weight to a causal convolution function"),
        Bypassed("*mamba.out_proj", "in training the fused kernel reads out_proj.weight"),
    ),
    # A block is only shared where two layers use it. Zamba2Config sets the widths to 2 x hidden_size, and to
    # that divided by the number of heads, once.
    twin_overrides={
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
)
