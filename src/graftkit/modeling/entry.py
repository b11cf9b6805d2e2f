"""How a model is run: by its own forward, or by those of its parts where its class has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.modeling.device import on_device_of
from graftkit.modeling.unwrapping import base_model_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def parts_to_run(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the models of which one consists whose class has no forward, by name; nothing of any other model.

    Such a class has a ``generate`` that takes its parts one after the other (Bark, Qwen2.5-Omni); what is trained
    is a part. Of the parts only those are returned that have a forward of their own.
    """
    from transformers import PreTrainedModel

    base = base_model_of(model)
    if not isinstance(base, PreTrainedModel) or _has_forward(base):
        return {}
    parts = base.named_children()
    return {name: part for name, part in parts if isinstance(part, PreTrainedModel) and _has_forward(part)}


def _has_forward(model: nn.Module) -> bool:
    from torch import nn

    return type(model).forward is not nn.Module.forward


def run(model: Any, batch: Mapping[str, Any]) -> Any:
    """Return what a model computes on ``batch``, in its mode and with or without gradients, as the caller has it.

    Args:
        model: a model, or a PEFT model around one.
        batch: what its forward takes; of a class without a forward, the inputs of its parts by name.

    Returns:
        The forward's output; of a class without a forward, the outputs of the parts that ``batch`` names.
    """
    given = on_device_of(model, batch)
    parts = parts_to_run(model)
    return {name: parts[name](**inputs) for name, inputs in given.items()} if parts else model(**given)
