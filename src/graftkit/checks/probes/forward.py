"""Ways to look at a live adapted model without leaving a trace on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating
from graftkit.planning.initializers import moves_base
from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

# How far a probe moves each adapter tensor: an adapter of ordinary rank then changes a weight by about a tenth.
_PROBE_STD = 0.05

# Largest accepted difference of logits, relative to the largest logit. Sums are reordered by a merge, so single
# precision keeps about five digits and half precision about two.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's logits on ``batch`` in eval mode, in float32 on the CPU.

    Labels stay in the batch: an encoder-decoder makes its decoder's input from them.
    """
    import torch

    with evaluating(model), torch.no_grad():
        output = model(**on_device_of(model, batch))
    return first_tensor(output).float().cpu()


def first_tensor(output: Any) -> Tensor:
    """The logits of an output, its first tensor for a model that has none, or the output that is a tensor."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    tensor = logits if logits is not None else output[0]
    return first_tensor(tensor) if isinstance(tensor, (tuple, list)) else tensor


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss on ``batch``, or the mean square of its logits where it computes none."""
    output = model(**on_device_of(model, batch))
    loss = getattr(output, "loss", None)
    return loss if loss is not None else first_tensor(output).float().pow(2).mean()


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The active adapters' own tensors, by name."""
    prefix, active = model.base_model.prefix, set(model.active_adapters)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part.startswith(prefix) for part in name.split(".")) and active & set(name.split("."))
    }


def is_untrained(model: PeftModel) -> bool:
    """Whether the adapter still changes exactly nothing: in every layer some tensor is all zero, or all are one.

    A zero factor makes a product of factors vanish; a method that scales starts at ones.
    """
    layers: dict[str, bool] = {}
    for name, parameter in adapter_parameters(model).items():
        layer = name.partition(f".{model.base_model.prefix}")[0]
        values = parameter.detach()
        layers[layer] = layers.get(layer, False) or not values.any() or bool((values == 1).all())
    return bool(layers) and all(layers.values())


@contextmanager
def probing(model: PeftModel, *, seed: int = 0) -> Iterator[None]:
    """Give an untrained adapter an effect inside, so that a check on it can fail; a trained one stays itself.

    The adapter's tensors are restored bit for bit.
    """
    import torch

    if not is_untrained(model):
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model)
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator) * _PROBE_STD
            parameter.add_(noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


@contextmanager
def leaving_no_trace(model: PeftModel) -> Iterator[None]:
    """Put back what looking at a model changes: gradients, what is trainable, modes, and the random state."""
    import torch

    parameters = list(model.parameters())
    found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    devices = {p.device for p in parameters if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), evaluating(model):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            for parameter, requires_grad, grad in found:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextmanager
def merging(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """Merged inside; whatever happens there, every layer comes out unmerged and with its own weights, bit for bit.

    Yields:
        copies of the base weights as they were before the merge, by name.

    Raises:
        MergeRefusedError: the adapter cannot be merged, or not without changing packed base weights for good.
    """
    import torch

    layers = adapted_layers(model)
    if (packed := packed_layer(model)) is not None:
        raise MergeRefusedError(
            f"merging into packed weights rounds them anew ({packed}); merge into the 16-bit base"
        )
    kept = {
        f"{path}.{name}": (layer.get_base_layer(), name, parameter, parameter.detach().clone())
        for path, layer in layers.items()
        for name, parameter in layer.get_base_layer().named_parameters(recurse=False)
    }
    try:
        try:
            model.merge_adapter()
        except Exception as error:
            raise MergeRefusedError(f"this adapter cannot be merged: {error}") from error
        yield {key: copied for key, (_, _, _, copied) in kept.items()}
    finally:
        for layer in layers.values():
            merged = getattr(layer, "merged_adapters", None)
            if merged:
                merged.clear()
        with torch.no_grad():
            for base, name, parameter, copied in kept.values():
                parameter.data = copied
                base._parameters[name] = parameter


def packed_layer(model: PeftModel) -> str | None:
    """The path of an adapted layer whose base weight is packed by a quantizer, or None."""
    found = (path for path, layer in adapted_layers(model).items() if quantization_of(layer.get_base_layer()))
    return next(found, None)


class MergeRefusedError(Exception):
    """A merge that PEFT, or prudence, refuses; the message says why."""


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's layers in the model, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def without_adapter(model: PeftModel) -> nn.Module:
    """A copy of the base model as it was before PEFT put layers into it."""
    copied = copy.deepcopy(model)
    base: Any = copied.get_base_model()
    # IA3 does not merge into packed weights, and by these marks refuses to take its layers off, too.
    packed = [name for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(base, name, False)]
    for name in packed:
        setattr(base, name, False)
    unloaded: nn.Module = copied.unload()
    for name in packed:
        setattr(unloaded, name, True)
    return unloaded


def sits_in_layers(model: PeftModel) -> bool:
    """Whether the adapter is in the model's layers; methods of prompt learning keep tensors beside them."""
    from peft.tuners.tuners_utils import BaseTuner

    return isinstance(model.base_model, BaseTuner)


def room_for_copy(model: nn.Module) -> str | None:
    """Why a second copy of the model would not fit in the CPU's memory, or None."""
    import psutil

    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = psutil.virtual_memory().available
    if next(model.parameters()).is_cuda or needed * 1.5 < free:
        return None
    return f"needs a second copy of the model: {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two logit tensors, relative to the largest logit of the first.

    Infinite where either holds a value that is not finite: such logits are never equal to anything.
    """
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    scale = a.abs().max().clamp_min(1e-12)
    return float((a - b).abs().max() / scale)


def moved_base(model: PeftModel) -> str | None:
    """The name of the active adapter's initializer where it moves part of the base weights, or None."""
    initializer = getattr(model.active_peft_config, "init_lora_weights", True)
    return str(initializer) if moves_base(initializer) else None


def tolerance(model: nn.Module) -> float:
    """The accepted ``difference`` for the coarsest floating type among the model's weights.

    Packed weights count as half precision: they are unpacked to it, and 8-bit ones round the activations of a row
    by what else is in the batch.
    """
    if any(quantization_of(module) for module in model.modules()):
        return _TOLERANCE["bfloat16"]
    present = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return max((_TOLERANCE[name] for name in present if name in _TOLERANCE), default=_TOLERANCE["bfloat16"])
