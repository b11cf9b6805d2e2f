"""Names in memory -> keys on disk, through transformers' own conversion mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def checkpoint_keys(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the checkpoint keys that hold each parameter or buffer of ``names``.

    A fused parameter (stacked experts, a joined gate and up projection) is spread over several keys. A model
    that transformers does not convert keeps its names.

    Source: ``transformers.core_model_loading.revert_weight_conversion``, which ``save_pretrained`` uses; it is
    run on meta tensors of the right shape, one parameter at a time.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {name: (name,) for name in names}
    stand_in = _StandIn(model)
    if not stand_in._weight_conversions:
        return {name: (name,) for name in names}
    tensors = model.state_dict(keep_vars=True)
    return {name: _revert(stand_in, name, tensors[name].shape) for name in names}


class _StandIn:
    """The model with its conversion mapping looked up once, not once per parameter, and not set on the model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self._model = model
        self._weight_conversions = getattr(model, "_weight_conversions", None)
        if self._weight_conversions is None:
            # As transformers does for a model it did not load: a changed prefix cannot be known to apply.
            mapping = get_model_conversion_mapping(model, add_legacy=False)
            self._weight_conversions = [c for c in mapping if not isinstance(c, PrefixChange)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _revert(stand_in: _StandIn, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(stand_in, {name: torch.empty(shape, device="meta")})
    return tuple(reverted)
