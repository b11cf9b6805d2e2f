"""Whether a model's parameters are sharded over processes: by ZeRO-3, by FSDP, or as DTensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# What FSDP puts into the path of a module that it wraps (torch.distributed.fsdp.FullyShardedDataParallel).
FSDP_WRAPPER = "_fsdp_wrapped_module."


def is_sharded(model: nn.Module) -> bool:
    """Check whether any parameter of the model is sharded over processes."""
    return any_sharded(model, model.parameters())


def any_sharded(model: nn.Module, parameters: Iterable[Any]) -> bool:
    """Check whether any of these parameters of a model is sharded over processes.

    What is added to a model that was sharded as it was loaded, such as an adapter, is not.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(is_shard(parameter) for parameter in parameters)


def is_shard(tensor: Any) -> bool:
    """Check whether this process holds a shard of the tensor: a parameter under ZeRO-3, or a DTensor."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "to_local")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the parameter's shape before sharding.

    Sources: DeepSpeed keeps it as ``ds_shape`` (deepspeed.runtime.zero.partition_parameters); a DTensor's own
    ``shape`` is the global one.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
