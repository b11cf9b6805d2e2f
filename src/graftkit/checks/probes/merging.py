"""The adapter of a live model merged for the time of a block, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftkit.checks.probes.live_adapter import adapted_layers
from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class MergeRefusedError(Exception):
    """PEFT cannot merge this adapter, or not without changing quantized weights; the message says why."""


@contextmanager
def merging(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """Merge the adapter for the block, then restore every base weight bit for bit.

    Yields:
        Copies of the base weights before the merge, by name.

    Raises:
        MergeRefusedError: the adapter cannot be merged, or not without changing quantized base weights.
    """
    import torch

    layers = adapted_layers(model)
    if (quantized := quantized_layer(model)) is not None:
        raise MergeRefusedError(
            f"merging into quantized weights rounds them again ({quantized}); merge into the 16-bit base"
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


def quantized_layer(model: PeftModel) -> str | None:
    """Return the path of an adapted layer whose base weight is quantized, or None."""
    found = (path for path, layer in adapted_layers(model).items() if quantization_of(layer.get_base_layer()))
    return next(found, None)
