"""Qwen 3 MoE: how engines weigh its experts, and the names its configuration was released with."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    served_twin=ServedTwin(
        overrides={
            # llama.cpp normalizes the weights of the chosen experts in any case (src/models/qwen3moe.cpp).
            "norm_topk_prob": True,
            # mlx-lm asks for both (mlx_lm/models/qwen3_moe.py), and the released configurations state them.
            "head_dim": 32,
        },
        tokens={"<|endoftext|>": "<|endoftext|>"},
    ),
)
