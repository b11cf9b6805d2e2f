"""Round double precision to a checkpoint's dtype, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Few enough elements that what is computed on the way stays in a processor's cache.
_PART = 2**17
# Neighbours that are looked at together for one that lies in the middle between two 16-bit numbers.
_RUN = 256
_LOWEST = {2: -(2**15), 4: -(2**31)}


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert ``exact`` (float64) to ``dtype``, rounding each element once, to nearest, ties to even."""
    import torch

    result = torch.empty(exact.shape, dtype=dtype)
    round_into(exact, result)
    return result


def round_into(exact: torch.Tensor, result: torch.Tensor) -> None:
    """Write ``exact`` (float64, contiguous) to ``result`` (contiguous), rounding each element once.

    torch converts to 16 bits via 32, which rounds twice. That matters only where the 32 bits lie exactly in the
    middle between two 16-bit numbers, while the exact value lies beside it. Those are found by their last bits,
    and converted again.
    """
    import torch

    if result.element_size() != 2:
        result.copy_(exact)
        return
    flat, into = exact.view(-1), result.view(-1)
    runs = len(flat) // _RUN
    # New memory costs more than the arithmetic: all parts share one buffer.
    single = torch.empty(min(runs * _RUN, _PART), dtype=torch.float32)
    doubtful = []
    for at in range(0, runs * _RUN, _PART):
        end = min(at + _PART, runs * _RUN)
        part = single[: end - at].copy_(flat[at:end])
        into[at:end] = part
        doubtful.append(_has_middles(part, result.dtype))
    again = torch.cat(doubtful).nonzero().flatten() if doubtful else ()
    if len(again):
        exactly = _odd(flat[: runs * _RUN].view(runs, _RUN)[again])
        into[: runs * _RUN].view(runs, _RUN)[again] = exactly.to(result.dtype)
    if runs * _RUN < len(flat):
        into[runs * _RUN :] = _odd(flat[runs * _RUN :])


def _has_middles(single: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Find the runs of 32-bit numbers that have one in the middle between two 16-bit ones, and perhaps some more.

    Returns:
        (runs,), bool.
    """
    import torch

    if dtype is torch.bfloat16:
        # The lower half of such a number is a one and 15 zeros. So is an upper half, but only next to minus zero.
        halves = single.view(torch.int16)
    else:
        # With float16 it ends in 12 zeros or more, because the smallest numbers have shorter significands.
        last = torch.tensor(_LOWEST[4], dtype=torch.int32)
        halves = torch.add(last, single.view(torch.int32), alpha=2**20)
    lowest: torch.Tensor = halves.view(len(single) // _RUN, -1).amin(1)
    return lowest == _LOWEST[halves.element_size()]


def _odd(exact: torch.Tensor) -> torch.Tensor:
    """Convert to float32 so that a second rounding, to 16 bits, is the only one ("round to odd").

    The last bit records whether anything was cut off; a 24-bit significand is enough for that with 8 or 11 bits.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    import torch

    single = exact.float()
    back = single.double()
    bits = single.view(torch.int32)
    # Towards zero where the conversion went away from it, then odd where it was not exact.
    bits -= (back.abs() > exact.abs()).int()
    bits |= ((back != exact) & exact.isfinite() & back.isfinite()).int()
    return single
