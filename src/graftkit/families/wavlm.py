"""WavLM: attention that hands its projections' weights to a function of torch."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

# Source: transformers' modeling_wavlm.py, WavLMAttention.torch_multi_head_self_attention.
_READ = "torch's multi_head_attention_forward is given its weight, so an adapter on the module is not run"

FAMILY = Family(
    name="wavlm",
    model_types=("wavlm",),
    bypassed=tuple(Bypassed(f"*.attention.{name}_proj", _READ) for name in ("q", "k", "v", "out")),
)
