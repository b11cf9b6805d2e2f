"""Several processes that train together: what the first one finds, all of them hear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from graftkit.errors import GraftError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor


def found_by_first(look: Callable[[], GraftError | None]) -> GraftError | None:
    """Let the first process look, and every process know what it found.

    Every process must call this at the same point: it is a collective where there is more than one.

    Args:
        look: called on the first process alone. What it raises is found, too.
    """
    import torch.distributed as dist

    if not _several():
        return look()
    box = [_looked(look) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed(values: Tensor) -> Tensor:
    """The sum over all processes; a collective where there is more than one."""
    import torch.distributed as dist

    if _several():
        dist.all_reduce(values)
    return values


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _looked(look: Callable[[], GraftError | None]) -> GraftError | None:
    """An error that other processes never hear of would leave them waiting."""
    try:
        return look()
    except GraftError as error:
        return error
    except Exception as error:
        return TrainingError("the guard could not finish", why=f"{type(error).__name__}: {error}", code="guard")
