"""MRA: attention that only a CUDA kernel computes."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="mra",
    model_types=("mra",),
    # Source: transformers' modeling_mra.py, MraSelfAttention.forward and load_cuda_kernels.
    reach_unknown="without its CUDA kernel its attention is zero, on a twin too",
)
