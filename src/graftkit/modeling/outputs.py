"""What a forward pass returns: every floating-point tensor by name, the main one, and a loss over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graftkit.modeling.entry import parts_to_run, run
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.random_state import seeding
from graftkit.modeling.unwrapping import peft_model_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# Words in the names of what one forward pass hands to the next, such as past_key_values, cache_params, mems.
_CARRIED = frozenset({"past", "cache", "mems", "kv"})
_LOSS = "loss"


def floating_outputs(output: Any) -> dict[str, Tensor]:
    """Return every floating-point tensor of a forward's output by its path in it, as they are, in their graph.

    Tuples, lists, mappings (``ModelOutput`` is one) and dataclasses are searched; ``output.a[1]`` is ``"a.1"``,
    and an output that is a tensor is ``""``. Complex tensors become pairs of real ones. Caches and other states
    that one forward pass hands to the next are left out.
    """
    import torch

    return {
        path: torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for path, tensor in _tensors(output, "")
        if tensor.is_floating_point() or tensor.is_complex()
    }


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for name, part in _parts(value):
        if not _CARRIED & set(name.split("_")):
            yield from _tensors(part, f"{path}.{name}" if path else name)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container holds, by name; nothing of any other object."""
    if isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", map(str, range(len(value))))
        yield from zip(names, value, strict=True)
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def main_output(output: Any) -> Tensor:
    """Return the logits of an output, or its first floating-point tensor that is not a loss where it has none.

    Raises:
        ValueError: it holds no floating-point tensor.
    """
    found = floating_outputs(output)
    order = sorted(found, key=lambda path: (path.partition(".")[0] != "logits", path == _LOSS))
    if not order:
        raise ValueError(f"the model returns no floating-point tensor: {type(output).__name__}")
    return found[order[0]]


def outputs_of(model: nn.Module, batch: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Return every floating-point output of the model on ``batch``, detached, by path, on the CPU.

    Computed in evaluation mode and from a fixed random state, because some models sample in their forward. Half
    precision becomes float32; float64 stays.

    Labels stay in the batch: an encoder-decoder makes its decoder's input from them.

    Raises:
        ValueError: the model returns no floating-point tensor.
    """
    import torch

    with seeding(model, seed), evaluating(model), torch.no_grad():
        output = run(of_data_alone(model), batch)
    found = {path: tensor.detach().cpu() for path, tensor in floating_outputs(output).items()}
    if not found:
        raise ValueError(f"the model returns no floating-point tensor: {type(output).__name__}")
    return {path: tensor if tensor.dtype == torch.float64 else tensor.float() for path, tensor in found.items()}


def of_data_alone(model: Any) -> Any:
    """Return what to call for the outputs that the batch alone decides: the model, or the base inside of AdaLoRA.

    AdaLoRA's own forward adds the orthogonality of its matrices to the base's loss, which says nothing about the
    data, and fails on an adapter that was not loaded as trainable (peft/tuners/adalora/model.py). The layers that
    it adapted are in the base.
    """
    from peft import AdaLoraModel

    peft_model = peft_model_of(model)
    tuner = getattr(peft_model, "base_model", None)
    return tuner.model if isinstance(tuner, AdaLoraModel) else model


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's own loss on ``batch``, or a loss over all its outputs where it computes none: 0-dim.

    The model runs in its own mode, and from the random state that there is. Of a class without a forward it is the
    sum of its parts' losses.
    """
    import torch

    output = run(of_data_alone(model), batch)
    if parts_to_run(model):
        return torch.stack([_loss_in(part).float().cpu() for part in output.values()]).sum()
    return _loss_in(output)


def _loss_in(output: Any) -> Tensor:
    loss = getattr(output, _LOSS, None)
    # Some classes return one loss a row.
    return loss.mean() if loss is not None else loss_over(output)


def loss_over(output: Any) -> Tensor:
    """Return a scalar that depends on every element of every floating-point output, 0-dim float32.

    The outputs are weighed by fixed random numbers. A mean of squares would not do: the squares of what a norm has
    normalized have a constant sum, so that no gradient would pass the norm.

    Raises:
        ValueError: there is no floating-point output.
    """
    import torch

    found = floating_outputs(output)
    if not found:
        raise ValueError(f"the model returns no floating-point tensor: {type(output).__name__}")
    trained = [tensor for tensor in found.values() if tensor.requires_grad] or list(found.values())
    return torch.stack([_weighed(tensor).cpu() for tensor in trained]).sum()


def _weighed(tensor: Tensor) -> Tensor:
    """Return the sum of the elements with random weights, which has about the size of one element.

    What is masked, by minus infinity, counts nothing.
    """
    import torch

    generator = torch.Generator(tensor.device).manual_seed(0)
    weights = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    values = tensor.float().masked_fill(tensor.isneginf(), 0.0)
    return (values * weights).sum() / math.sqrt(max(tensor.numel(), 1))
