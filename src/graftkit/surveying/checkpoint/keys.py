"""Names in memory <-> keys on disk, through transformers' own conversion mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.surveying.checkpoint.origins import recording_origins

if TYPE_CHECKING:
    from torch import nn


def checkpoint_keys(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the checkpoint keys that hold each parameter or buffer of ``names``.

    A fused parameter (stacked experts, a joined gate and up projection) is spread over several keys. A model
    that transformers does not convert keeps its names.
    """
    return {name: tuple(stored) for name, stored in stored_shapes(model, names).items()}


def stored_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each parameter or buffer of ``names``, the checkpoint keys that hold it and their shapes.

    Source: ``transformers.core_model_loading.revert_weight_conversion``, which ``save_pretrained`` uses; it is
    run on meta tensors of the right shapes.
    """
    from transformers import PreTrainedModel

    tensors = model.state_dict(keep_vars=True)
    unchanged = {name: {name: tuple(tensors[name].shape)} for name in names}
    if not isinstance(model, PreTrainedModel):
        return unchanged
    stand_in = _StandIn(model)
    if not stand_in._weight_conversions:
        return unchanged
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    together = _revert(stand_in, shapes)
    # Two names of which both are stored under one key: the second one took it.
    return {name: together.get(name) or _revert(stand_in, {name: shapes[name]})[name] for name in unchanged}


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


def _revert(stand_in: _StandIn, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each parameter, the checkpoint keys that it has a part in, and their shapes.

    They are reverted together, because a key may hold several parameters, and several parameters may be spread
    over several keys: the experts of two towers that a checkpoint counts through, for one.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with recording_origins(tensors) as origins_of:
        reverted = revert_weight_conversion(stand_in, tensors)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in reverted.items():
        for name in origins_of(tensor):
            found.setdefault(name, {})[key] = tuple(tensor.shape)
    return found


@dataclass(frozen=True)
class KeyReader:
    """Reads a checkpoint's keys as ``from_pretrained`` does: key on disk -> name in memory.

    Attributes:
        prefix: of the base model inside a model with a head.
        renamings, converters: transformers' own for this model.
        known: the model's parameters and saved buffers by name.
    """

    prefix: str
    renamings: list[Any] = field(repr=False)
    converters: list[Any] = field(repr=False)
    known: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> KeyReader:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        return cls(
            prefix=model.base_model_prefix,
            renamings=[entry for entry in mapping if isinstance(entry, WeightRenaming)],
            converters=[entry for entry in mapping if isinstance(entry, WeightConverter)],
            known=model.state_dict(keep_vars=True),
        )

    def target_of(self, key: str) -> tuple[str | None, str]:
        """Return the name that a key is loaded under, and the pattern of the converter that it goes through.

        The name is None where the class does not load it; of several names that a converter makes, it is the
        first. The pattern is "" where only the name differs.

        Source: ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.
        """
        from transformers.core_model_loading import rename_source_key

        known: Any = self.known
        target, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, known)
        if target not in known and key in known:
            # It must not be renamed; at most the prefix is added.
            target, pattern = rename_source_key(key, [], [], self.prefix, known)
        return (target if target in known else None), pattern or ""
