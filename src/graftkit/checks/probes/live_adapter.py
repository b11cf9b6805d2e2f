"""The adapter of a live model: its layers and tensors, given an effect for a probe, or taken off a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.random_state import fork_random_state
from graftkit.planning.initializers import moves_base

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

# Standard deviation of the noise on each adapter tensor: at usual ranks it changes a weight by about a tenth.
_NOISE_STD = 0.05


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the active adapters' own tensors by name."""
    prefix, active = model.base_model.prefix, set(model.active_adapters)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part.startswith(prefix) for part in name.split(".")) and active & set(name.split("."))
    }


def _trained_rows(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the active adapters' trained tokens by name, which are merged like the rest of the adapter."""
    active = set(model.active_adapters)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "trainable_tokens_delta" in name.split(".") and active & set(name.split("."))
    }


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's layers in the model by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def sits_in_layers(model: PeftModel) -> bool:
    """Check whether the adapter is in the model's layers; prompt learning keeps its tensors beside them."""
    from peft.tuners.tuners_utils import BaseTuner

    return isinstance(model.base_model, BaseTuner)


def moved_base(model: PeftModel) -> str | None:
    """Return the active adapter's initializer if it moves part of the base weights into the adapter, or None."""
    initializer = getattr(model.active_peft_config, "init_lora_weights", True)
    return str(initializer) if moves_base(initializer) else None


def is_untrained(model: PeftModel) -> bool:
    """Check whether the adapter changes nothing yet: every layer has a tensor of zeros or of ones.

    A factor of zeros makes a product zero; methods that scale start at ones.
    """
    layers: dict[str, bool] = {}
    for name, parameter in adapter_parameters(model).items():
        layer = name.partition(f".{model.base_model.prefix}")[0]
        values = parameter.detach()
        layers[layer] = layers.get(layer, False) or not values.any() or bool((values == 1).all())
    return bool(layers) and all(layers.values())


@contextmanager
def perturbing(model: PeftModel, *, seed: int = 0) -> Iterator[None]:
    """Add noise to an untrained adapter for the block, so that a check on it can fail; leave a trained one alone.

    The adapter's tensors are restored bit for bit.
    """
    with perturbed(model, seed=seed) if is_untrained(model) else nullcontext():
        yield


@contextmanager
def perturbed(model: PeftModel, *, seed: int = 0) -> Iterator[None]:
    """Add noise to the adapter for the block, trained or not; its tensors are restored bit for bit."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = {**adapter_parameters(model), **_trained_rows(model)}
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator) * _NOISE_STD
            parameter.add_(noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


@contextmanager
def restoring_state(model: PeftModel) -> Iterator[None]:
    """Restore after the block what probes change: gradients, ``requires_grad``, modes and the random state."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with fork_random_state(model), evaluating(model), restoring_gradients(model):
        try:
            yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


@contextmanager
def restoring_gradients(model: nn.Module) -> Iterator[None]:
    """Start the block without gradients, and restore after it those that the model had."""
    found = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in found:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in found:
            parameter.grad = grad


def without_adapter(model: PeftModel) -> nn.Module:
    """Return a copy of the base model as it was before PEFT put layers into it."""
    copied = copy.deepcopy(model)
    base: Any = copied.get_base_model()
    # By these flags IA3, which does not merge into quantized weights, also refuses to take its layers off.
    flags = [name for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(base, name, False)]
    for name in flags:
        setattr(base, name, False)
    unloaded: nn.Module = copied.unload()
    for name in flags:
        setattr(unloaded, name, True)
    return unloaded
