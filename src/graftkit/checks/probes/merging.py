"""The adapter of a live model merged for the time of a block, and taken out again bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import compare, room_for_copy
from graftkit.checks.probes.live_adapter import adapted_layers
from graftkit.modeling.outputs import outputs_of
from graftkit.surveying.quantized import quantization_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class MergeRefusedError(Exception):
    """PEFT cannot merge this adapter, or not without changing quantized weights; the message says why.

    Attributes:
        by_design: whether that is refused on purpose, rather than something that went wrong.
    """

    def __init__(self, message: str, *, by_design: bool) -> None:
        super().__init__(message)
        self.by_design = by_design


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
            f"merging into quantized weights rounds them again ({quantized}); merge into the 16-bit base",
            by_design=True,
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
            by_design = isinstance(error, (NotImplementedError, ValueError))
            raise MergeRefusedError(f"this adapter cannot be merged: {error}", by_design=by_design) from error
        yield {key: copied for key, (_, _, _, copied) in kept.items()}
    finally:
        for layer in layers.values():
            if getattr(layer, "merged_adapters", None):
                _unmerge(layer)
        with torch.no_grad():
            for base, name, parameter, copied in kept.values():
                parameter.data = copied
                base._parameters[name] = parameter


@dataclass(frozen=True)
class MergedPass:
    """What a model computes while its adapter is merged.

    Attributes:
        outputs: every floating-point output by path, as ``outputs_of`` returns them.
        weights: the merged weights and biases by path, on the CPU.
    """

    outputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def merged_pass(model: PeftModel, batch: Mapping[str, Any]) -> MergedPass:
    """Run the model on ``batch`` with its adapter merged, and take the adapter out again.

    Raises:
        MergeRefusedError: the adapter cannot be merged, or not without changing quantized base weights.
    """
    layers = adapted_layers(model)
    with merging(model) as before:
        weights = {}
        for name in before:
            path, _, leaf = name.rpartition(".")
            weights[name] = getattr(layers[path].get_base_layer(), leaf).detach().cpu().clone()
        return MergedPass(outputs_of(model, batch), weights)


# The weights of a merge in single precision carry about seven digits. What float64 computes is as exact as the
# parts of a model that compute in single precision in any case allow: norms, routers, positions.
_WEIGHTS_AGREE, _OUTPUTS_AGREE = 1e-5, 1e-6


@dataclass(frozen=True)
class InFloat64:
    """The comparison of merged and adapted, repeated in float64.

    Attributes:
        difference: of the outputs, relative, as in ``Comparison``.
        weights: how far the merged weights are from those that were merged in the model's own precision.
    """

    difference: float
    weights: float

    @property
    def agrees(self) -> bool:
        """Whether merged and adapted are the same function, so that only rounding tells them apart."""
        return self.difference <= _OUTPUTS_AGREE and self.weights <= _WEIGHTS_AGREE


def repeat_in_float64(model: PeftModel, batch: Mapping[str, Any], merged: MergedPass) -> InFloat64 | None:
    """Compare merged and adapted once more on a copy of the model in float64.

    Where rounding decides a rank or a length (the best k of many, the frames of a vocoder) two sums that differ in
    their last digit can give quite different outputs. They do not in float64, and a wrong merge does.

    Returns:
        None where it cannot be done: the model is not in single precision, a copy does not fit in memory or
        cannot be made (of tensors that are computed from others), or the model's code does not run in float64.
    """
    import torch

    floating = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if floating != {torch.float32} or room_for_copy(model) is not None:
        return None
    given = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        exact = copy.deepcopy(model).double()
        adapted, again = outputs_of(exact, given), merged_pass(exact, given)
    except (RuntimeError, ValueError, TypeError, MergeRefusedError):
        return None
    return InFloat64(compare(adapted, again.outputs).difference, compare(again.weights, merged.weights).difference)


def _unmerge(layer: Any) -> None:
    """Take an adapter out of its layer, whose weights are restored afterwards; some methods exchange modules."""
    with suppress(NotImplementedError):
        layer.unmerge()
    layer.merged_adapters.clear()


def quantized_layer(model: PeftModel) -> str | None:
    """Return the path of an adapted layer whose base weight is quantized, or None."""
    found = (path for path, layer in adapted_layers(model).items() if quantization_of(layer.get_base_layer()))
    return next(found, None)
