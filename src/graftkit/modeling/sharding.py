"""Whether one process holds a model's parameters whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# What FSDP puts into the path of a module that it wraps (torch.distributed.fsdp.FullyShardedDataParallel).
FSDP_PART = "_fsdp_wrapped_module."


def in_parts(model: nn.Module) -> bool:
    """Whether any parameter is shared out over processes: by ZeRO-3, by FSDP, or as a DTensor."""
    return has_parts(model, model.parameters())


def has_parts(model: nn.Module, parameters: Iterable[Any]) -> bool:
    """Whether any of these parameters of a model is shared out over processes.

    What is added to a model that was taken apart as it was loaded stays whole, an adapter for one.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(is_part(parameter) for parameter in parameters)


def is_part(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor: ZeRO-3's parameters, and DTensors."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "to_local")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The parameter's shape as one process would hold it.

    Sources: DeepSpeed keeps it as ``ds_shape`` (deepspeed.runtime.zero.partition_parameters); a DTensor's own
    ``shape`` is the global one.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
