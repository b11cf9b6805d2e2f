"""From double precision to a checkpoint's type with one rounding: what a merge is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Small enough that the steps in between stay in a processor's cache: fresh memory costs more than the arithmetic.
_PART = 2**15


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``exact`` (float64) as ``dtype``, each element rounded once, to nearest, ties to even.

    torch converts to 16 bits by way of 32, which rounds twice. Here the step to 32 bits keeps in its last bit
    whether anything was cut off ("round to odd"), so that the second rounding alone decides; 24 bits are enough
    for that with 8 or 11. Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    import torch

    if dtype.itemsize != 2:
        return exact.to(dtype)
    result = torch.empty(exact.shape, dtype=dtype)
    flat, into = exact.reshape(-1), result.view(-1)
    for at in range(0, len(flat), _PART):
        into[at : at + _PART] = _odd(flat[at : at + _PART])
    return result


def _odd(exact: torch.Tensor) -> torch.Tensor:
    """As float32; its last bit is set where something was cut off."""
    import torch

    single = exact.float()
    back = single.double()
    bits = single.view(torch.int32)
    # Towards zero where the conversion went away from it, then odd where it was not exact.
    bits -= (back.abs() > exact.abs()).int()
    bits |= ((back != exact) & exact.isfinite() & back.isfinite()).int()
    return single
