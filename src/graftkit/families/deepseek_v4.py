"""DeepSeek V4: compressed attention."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    # A compressor emits one entry for this many tokens: at the released 128 a short batch never reaches it.
    twin_overrides={
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
)
