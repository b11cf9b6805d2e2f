"""A model, and its parameters' names, without what PEFT, DDP and FSDP put around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.modeling.sharding import FSDP_WRAPPER

if TYPE_CHECKING:
    from peft import PeftModel

# What PEFT puts before the base model's own names (peft.PeftModel holds a tuner, which holds the model).
PEFT_PREFIX = "base_model.model."


def base_model_of(model: Any) -> Any:
    """Return the base model inside a PEFT model, a DDP wrapper, or both; any other model as it is."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def peft_model_of(model: Any) -> PeftModel | None:
    """Return the PEFT model inside the wrappers that distribute or compile it, or None."""
    from peft import PeftModel

    while model is not None and not isinstance(model, PeftModel):
        model = getattr(model, "module", getattr(model, "_orig_mod", None))
    return model


def name_in_base(name: str) -> str:
    """Return a parameter's name as the base model has it, without the parts that FSDP and PEFT add in front."""
    return name.replace(FSDP_WRAPPER, "").removeprefix(PEFT_PREFIX)


def without_base_layers(path: str) -> str:
    """Return a path without ``base_layer``, PEFT's name for a layer that an adapter layer wraps."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def base_layer_of(module: Any) -> Any:
    """Return the layer under PEFT's adapter layers; any other module as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
