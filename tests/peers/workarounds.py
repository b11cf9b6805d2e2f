"""The ways in which people get PEFT's LoRA onto wrapped linears, each written as its users do.

Every one is a function from a base's folder to an adapted model, with plain names as targets. They differ in what
clamps the update afterwards, and in the names that are saved:

========================= ============================== =========================
way                       the bounds are around          tensors
========================= ============================== =========================
redirect to the inside    linear and adapter             q_proj.linear.lora_A
redirect in place         nothing, where adapted         q_proj.lora_A
clamped LoRA layer        linear and adapter             q_proj.lora_A
wrapper as base layer     the linear alone               q_proj.lora_A
linear that clamps itself the linear alone               q_proj.lora_A
permanent unwrap          nothing                        q_proj.lora_A
plain linear class        nothing                        q_proj.lora_A
wrapper that only passes  nothing                        q_proj.linear.lora_A
========================= ============================== =========================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

TARGETS = ["q_proj", "down_proj"]


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, **{"target_modules": list(TARGETS), **options})


def load(base: Path) -> Gemma4ForConditionalGeneration:
    """Load a base as its users do."""
    return Gemma4ForConditionalGeneration.from_pretrained(base).eval()


# ---- PEFT's own function, patched (peft#3129, unsloth, axolotl) ----


@contextmanager
def _redirected(change: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    """Patch ``_create_and_replace``: for a wrapper, ``change`` gives (target, its name, its parent, its key)."""
    original = lora.LoraModel._create_and_replace

    def patched(
        self: Any, config: Any, name: str, target: Any, target_name: str, parent: Any, current_key: str, **kw: Any
    ) -> None:
        if isinstance(target, Gemma4ClippableLinear):
            target, target_name, parent, current_key = change(target, target_name, parent, current_key)
        original(self, config, name, target, target_name, parent, current_key=current_key, **kw)

    with patch.object(lora.LoraModel, "_create_and_replace", patched):
        yield


def redirect_to_the_inside(base: Path) -> PeftModel:
    """Adapt the linear in its own place, as unsloth and axolotl do; their lists of targets name the wrapper."""
    with _redirected(lambda target, name, parent, key: (target.linear, "linear", target, f"{key}.linear")):
        return get_peft_model(load(base), config())


def redirect_in_place(base: Path) -> PeftModel:
    """Give PEFT the linear inside, and let it replace the wrapper: the short patch of peft#3129."""
    with _redirected(lambda target, name, parent, key: (target.linear, name, parent, key)):
        return get_peft_model(load(base), config())


# ---- PEFT's table of custom modules ----


class ClampedLora(lora.Linear):
    """A LoRA layer around the linear inside that also does what the wrapper did."""

    def __init__(self, wrapper: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(wrapper.linear, adapter_name, **kwargs)
        self.bounds = {name: value.item() for name, value in wrapper.named_buffers()}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bounds = self.bounds
        result = super().forward(x.clamp(bounds["input_min"], bounds["input_max"]), *args, **kwargs)
        return result.clamp(bounds["output_min"], bounds["output_max"])


class LoraOnWrapper(lora.Linear):
    """A LoRA layer whose base layer is the wrapper, as in peft#3130."""

    def __init__(self, wrapper: Any, adapter_name: str, **kwargs: Any) -> None:
        wrapper.in_features, wrapper.out_features = wrapper.linear.in_features, wrapper.linear.out_features
        # PEFT looks for a weight; one that is no parameter of the wrapper is saved once.
        object.__setattr__(wrapper, "weight", wrapper.linear.weight)
        super().__init__(wrapper, adapter_name, **kwargs)


def _with_layer(base: Path, layer: type) -> PeftModel:
    custom = config()
    custom._register_custom_module({Gemma4ClippableLinear: layer})
    return get_peft_model(load(base), custom)


def clamped_lora_layer(base: Path) -> PeftModel:
    """Replace the wrapper by a LoRA layer that clamps the sum of linear and adapter."""
    return _with_layer(base, ClampedLora)


def wrapper_as_base_layer(base: Path) -> PeftModel:
    """Add the update to what the wrapper returns."""
    return _with_layer(base, LoraOnWrapper)


# ---- surgery on the model ----


def permanent_unwrap(base: Path) -> PeftModel:
    """Put every wrapper's linear in its place, for good."""
    model = load(base)
    for path, module in list(model.named_modules()):
        if isinstance(module, Gemma4ClippableLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.linear)
    return get_peft_model(model, config())


# ---- another class under transformers' name ----


class PlainLinear(nn.Linear):
    """A linear with the wrapper's signature."""

    use_clipped_linears = False

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


class ClampingLinear(PlainLinear):
    """A linear that clamps itself: transformers#45388's idea."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name in ("input_min", "input_max", "output_min", "output_max"):
            self.register_buffer(name, torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(self.input_min, self.input_max)).clamp(self.output_min, self.output_max)


class PassingWrapper(nn.Module):
    """A wrapper of the same names that leaves the clamps out."""

    use_clipped_linears = False

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _with_class(base: Path, cls: type, **options: Any) -> PeftModel:
    original = load(base)
    weights = original.state_dict()
    if issubclass(cls, nn.Linear):
        weights = {_without_linear(name, original): value for name, value in weights.items()}
    with patch.object(modeling_gemma4, "Gemma4ClippableLinear", cls):
        model = Gemma4ForConditionalGeneration(original.config).eval()
    expected = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights.items() if name in expected})
    return get_peft_model(model, config(**options))


def _without_linear(name: str, original: nn.Module) -> str:
    path = name.removesuffix(".linear.weight")
    wrapped = path != name and isinstance(original.get_submodule(path), Gemma4ClippableLinear)
    return f"{path}.weight" if wrapped else name


def plain_linear_class(base: Path) -> PeftModel:
    return _with_class(base, PlainLinear)


def linear_that_clamps_itself(base: Path) -> PeftModel:
    return _with_class(base, ClampingLinear)


def wrapper_that_only_passes(base: Path) -> PeftModel:
    """Keep the names of the linears: nothing in the saved files is different."""
    names = "|".join(TARGETS)
    inside_or_plain = rf".*_tower\..*\.({names})\.linear|.*language_model\..*\.({names})"
    return _with_class(base, PassingWrapper, target_modules=inside_or_plain)
