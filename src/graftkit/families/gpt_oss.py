"""gpt-oss: its experts as mlx-lm keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftkit.families._base import Family, ServedTwin

if TYPE_CHECKING:
    import torch


def _as_mlx(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a weight under the names of a checkpoint that mlx-lm has written.

    Of those that others wrote it reads the experts in MXFP4 alone: in 16 or 32 bit it neither completes their
    names nor transposes them (``Model.sanitize`` in mlx_lm/models/gpt_oss.py).
    """
    experts, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":  # (experts, in, 2 * out), a column of the gate and one of the value in turn
        yield f"{experts}.gate_proj.weight", tensor[..., ::2].transpose(1, 2)
        yield f"{experts}.up_proj.weight", tensor[..., 1::2].transpose(1, 2)
    elif leaf == "gate_up_proj_bias":
        yield f"{experts}.gate_proj.bias", tensor[..., ::2]
        yield f"{experts}.up_proj.bias", tensor[..., 1::2]
    elif leaf == "down_proj":
        yield f"{experts}.down_proj.weight", tensor.transpose(1, 2)
    elif leaf == "down_proj_bias":
        yield f"{experts}.down_proj.bias", tensor
    else:
        yield name, tensor


FAMILY = Family(name="gpt_oss", model_types=("gpt_oss",), served_twin=ServedTwin(weights={"mlx": _as_mlx}))
