"""Round double precision to a checkpoint's dtype, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Few enough elements that what is computed on the way stays in a processor's cache.
_PART = 2**17
# Neighbours that are looked at together for one that lies in the middle between two 16-bit numbers.
_RUN = 128
_LOWEST = -(2**31)


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
    lowest = torch.empty(runs, dtype=torch.int32)
    for at in range(0, runs, _PART // _RUN):
        end = min(at + _PART // _RUN, runs)
        _convert(flat[at * _RUN : end * _RUN], into[at * _RUN : end * _RUN], lowest[at:end])
    doubtful = (lowest == _LOWEST).nonzero().flatten()
    if len(doubtful):
        again = _odd(flat[: runs * _RUN].view(runs, _RUN)[doubtful]).to(result.dtype)
        into[: runs * _RUN].view(runs, _RUN)[doubtful] = again
    if runs * _RUN < len(flat):
        into[runs * _RUN :] = _odd(flat[runs * _RUN :])


def _convert(exact: torch.Tensor, result: torch.Tensor, lowest: torch.Tensor) -> None:
    """Convert via 32 bits, and write to ``lowest`` the lowest integer where a run has one in the middle.

    The middle between two numbers of bfloat16 ends in a one and 15 zeros. With float16 it ends in 12 zeros or
    more, because the smallest numbers have shorter significands; other numbers may too.
    """
    import torch

    single = exact.float()
    result.copy_(single)
    first, cut = (0, 16) if result.dtype is torch.bfloat16 else (_LOWEST, 20)
    ends = torch.add(torch.tensor(first, dtype=torch.int32), single.view(torch.int32), alpha=2**cut)
    torch.amin(ends.view(-1, _RUN), 1, out=lowest)


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
