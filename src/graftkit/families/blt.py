"""Byte Latent Transformer: a global model as wide as several local states side by side."""

from __future__ import annotations

from graftkit.families._base import Family

# Two local states (cross_attn_k) are one global state, so that nothing projects between them (BltConfig).
_LOCAL = {"hidden_size": 32, "hidden_size_global": 64}

FAMILY = Family(
    name="blt",
    model_types=("blt",),
    twin_overrides={"encoder_config": _LOCAL, "decoder_config": {**_LOCAL, "head_dim": 8}},
)
