"""What a batch trains: the model's own loss, or one number that all of its outputs decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from graftkit.modeling.device import on_device_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a model gives back for its next call is no result of this one.
_STATE = ("past_key_values", "cache", "mems")


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's own loss on ``batch``; where it computes none, the loss of ``outputs_loss``."""
    output = model(**on_device_of(model, batch))
    loss = getattr(output, "loss", None)
    return loss if loss is not None else outputs_loss(output)


def outputs_loss(output: Any) -> Tensor:
    """Return the mean square distance of each output from fixed random values, summed over the outputs.

    The mean square alone would not do: that of a layer norm's output is the same whatever goes in.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = [tensor.float() for _, tensor in floating_outputs(output) if tensor.numel()]
    if not tensors:
        raise TypeError(f"no floating-point tensor in {type(output).__name__}")
    wanted = [torch.randn(tensor.shape, generator=generator).to(tensor.device) for tensor in tensors]
    return torch.stack([(a.cpu() - b.cpu()).pow(2).mean() for a, b in zip(tensors, wanted, strict=True)]).sum()


def floating_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors of an output by name, without the state for the model's next call."""
    import torch

    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
        return
    for key, value in _items(output):
        if not any(word in str(key) for word in _STATE):
            yield from floating_outputs(value, f"{name}.{key}".lstrip("."))


def _items(output: Any) -> Iterator[tuple[object, Any]]:
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, (tuple, list)):
        yield from enumerate(output)
    elif is_dataclass(output):
        yield from ((field.name, getattr(output, field.name)) for field in fields(output))
