"""Stock PEFT's own form: what ``save_pretrained`` writes and ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from graftkit.adapters.file import CONFIG_NAME, read_adapter
from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, Other, Slice
from graftkit.converting.dialects._base import DialectFormat
from graftkit.engines import Feature
from graftkit.merging.adapter.effects import Effects, read_effects
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import BiasDelta, Change, LowRank, PeftLayer, SavedRows

if TYPE_CHECKING:
    import torch

_ORIGIN = ("base_model_name_or_path", "revision", "task_type")


@dataclass(frozen=True)
class PeftDialect(DialectFormat):
    """What stock PEFT reads."""

    name: ClassVar[str] = "peft"
    writes: ClassVar[bool] = False

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG_NAME).is_file()

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read an adapter as PEFT does.

        Raises:
            AdapterError: the folder is not a usable adapter.
            MergeError: ``merge-does-not-fit``: a tensor belongs to no module of the base; or it is of a kind whose
                update depends on its input.
        """
        file = read_adapter(folder)
        effects = read_effects(file, base.model)
        factors: list[Factors] = []
        others: list[Other] = []
        for parameter, changes in effects.changes.items():
            for change in changes:
                if isinstance(change, LowRank) and change.is_plain:
                    factors += _low_rank(parameter, change, effects, base)
                else:
                    others.append(Other(_feature(change), parameter))
        origin = {name: file.config[name] for name in _ORIGIN if file.config.get(name) is not None}
        return Deltas(tuple(factors), tuple(others), origin)


def _low_rank(parameter: str, change: LowRank, effects: Effects, base: ConvertBase) -> Iterator[Factors]:
    tensors = effects.tensors
    shape = base.matrix(parameter)
    numbers = range(change.experts) if change.experts else (None,)
    for number in numbers:
        yield Factors(
            at=Slice(parameter, number),
            rank=change.rank,
            shape=shape,
            scale=change.scale,
            dtype=_dtype(tensors, change.b),
            name=change.b,
            read=_reader(tensors, change, number),
        )


def _reader(tensors: AdapterTensors, change: LowRank, number: int | None):  # type: ignore[no-untyped-def]
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        if number is None:
            return tensors.read_cached(change.a).flatten(1), tensors.read_cached(change.b).flatten(1)
        a, b = tensors.read_cached(change.a), tensors.read_cached(change.b)
        # Source: ``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``: A by expert, B by rank.
        first = number * change.rank
        return a[first : first + change.rank], b.view(len(b), change.rank, -1)[:, :, number]

    return read


def _dtype(tensors: AdapterTensors, name: str) -> str:
    stored = tensors.file.tensors.get(name)
    return "F32" if stored is None else stored.dtype


def _feature(change: Change) -> Feature:
    if isinstance(change, LowRank):
        return Feature.DORA
    if isinstance(change, BiasDelta):
        return Feature.BIAS
    if isinstance(change, SavedRows):
        return Feature.TRAINABLE_TOKENS
    return Feature.OTHER_METHOD if isinstance(change, PeftLayer) else Feature.MODULES_TO_SAVE


DIALECT = PeftDialect()
