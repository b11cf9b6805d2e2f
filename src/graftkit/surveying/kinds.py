"""The kinds of layer that carry a weight an adapter may go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from torch import nn

LINEAR = "linear"
TRANSPOSED = "conv1d_transposed"
CONV = "conv"
EMBEDDING = "embedding"
MULTIHEAD = "multihead_attention"
PARAMETER = "parameter"


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of site a module is, None where it is none. Quantized linears are linears."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (nn.MultiheadAttention, MULTIHEAD),
        (nn.Linear, LINEAR),
        (Conv1D, TRANSPOSED),
        (nn.Embedding, EMBEDDING),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONV),
    )
    if quantization_of(module) is not None:
        return LINEAR
    return next((kind for cls, kind in kinds if isinstance(module, cls)), None)
