"""Gemma 3: what engines take for granted about its layers."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

# Every sixth layer is a global one: llama.cpp and mlx-lm count on it (``set_swa_pattern(6)`` in
# src/models/gemma3.cpp; ``sliding_window_pattern`` in mlx_lm/models/gemma3_text.py).
_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    served_twin=ServedTwin(
        overrides={
            "num_hidden_layers": len(_LAYERS),
            "layer_types": _LAYERS,
            "sliding_window_pattern": len(_LAYERS),
            # llama.cpp scales by the head's size in all but the 27B model (src/models/gemma3.cpp).
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
        }
    ),
)
