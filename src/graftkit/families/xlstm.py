"""xLSTM: queries and keys half as wide as the layers."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="xlstm",
    model_types=("xlstm",),
    # xLSTMConfig.qk_dim rounds half of the hidden size up to a multiple of 64, xLSTMLayer.qk_dim does not: they
    # agree where it is one. Of num_blocks and num_hidden_layers each stands for the other (xLSTMConfig).
    twin_overrides={"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2},
)
