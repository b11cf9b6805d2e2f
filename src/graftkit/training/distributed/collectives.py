"""Checks and sums over the processes that train together: collectives where there are several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graftkit.errors import GraftError, TrainingError
from graftkit.text import describe

if TYPE_CHECKING:
    from torch import Tensor


def check_on_first_process(check: Callable[[], GraftError | None]) -> None:
    """Run a check on the first process, and raise the error that it returns or raises on every process."""
    import torch.distributed as dist

    if not _several():
        error = check()
    else:
        box = [_caught(check) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0)
        error = box[0]
    if error is not None:
        raise error


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the values over all processes."""
    import torch.distributed as dist

    if _several():
        dist.all_reduce(values)
    return values


def any_process(here: bool, device: Any) -> bool:
    """Check whether the condition is true on any process; its tensor is made on this process's ``device``."""
    if not _several():
        return here
    import torch

    return bool(sum_over_processes(torch.tensor([float(here)], device=device)).item())


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _caught(check: Callable[[], GraftError | None]) -> GraftError | None:
    """Return every error: the other processes would hang if it were raised here alone."""
    try:
        return check()
    except GraftError as error:
        return error
    except Exception as error:
        return TrainingError("the guard could not finish", why=describe(error), code="guard")
