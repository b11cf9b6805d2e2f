"""Round double precision to a checkpoint's dtype once, as the exact result that a merge is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Small enough that intermediate results stay in a processor's cache: new memory costs more than the arithmetic.
_PART = 2**15


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert ``exact`` (float64) to ``dtype``, rounding each element once, to nearest, ties to even.

    torch converts to 16 bits via 32, which rounds twice. Here the step to 32 bits records in its last bit whether
    anything was cut off ("round to odd"), so that only the second step rounds; a 24-bit significand is enough for
    that with 8 or 11 bits. Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
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
    """Convert to float32, with the last bit set where something was cut off."""
    import torch

    single = exact.float()
    back = single.double()
    bits = single.view(torch.int32)
    # Towards zero where the conversion went away from it, then odd where it was not exact.
    bits -= (back.abs() > exact.abs()).int()
    bits |= ((back != exact) & exact.isfinite() & back.isfinite()).int()
    return single
