"""An adapter's tensors, read one at a time by position: never mapped, so that memory holds what is in use."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.adapters.file import AdapterFile
from graftkit.errors import MergeError, reraise_as
from graftkit.merging.checkpoint.shards import FLOATS, Shard, read_shard, torch_dtype
from graftkit.merging.errors import adapter_unreadable
from graftkit.merging.io.read import buffer_of, opened

if TYPE_CHECKING:
    import torch


# Experts lie one after another on disk, each with two or three matrices from two of the adapter's tensors; and the
# verification is one file behind.
_KEPT = 4


@dataclass(frozen=True, eq=False)
class AdapterTensors:
    """The tensors of one adapter, as PEFT would load them.

    Attributes:
        file: the adapter.
        converted: tensors that PEFT makes of those in the file when it loads them (experts saved one by one).
        gone: names in the file that those replace.
    """

    file: AdapterFile
    converted: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    gone: frozenset[str] = frozenset()
    _kept: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @cached_property
    def _shard(self) -> Shard:
        with reraise_as(adapter_unreadable, self.file.weights_path):
            return read_shard(self.file.weights_path)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = {name: t.shape for name, t in self._shard.tensors.items() if name not in self.gone}
        return MappingProxyType({**stored, **{name: tuple(t.shape) for name, t in self.converted.items()}})

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the type it is stored in.

        Raises:
            KeyError: there is none of that name.
            MergeError: ``merge-not-finite``: it holds a NaN or an infinity.
            AdapterError: ``adapter-weights``: the file cannot be read any more.
        """
        return self.rows(name, 0, (self.shapes[name] or (1,))[0]).view(self.shapes[name])

    def read_again(self, name: str) -> torch.Tensor:
        """As :meth:`read`, for a tensor that the next disk tensors will need too: the last few are kept."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self.read(name)
                while len(self._kept) > _KEPT:
                    self._kept.pop(next(iter(self._kept)))
            return self._kept[name]

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some rows (of the first axis) of a tensor."""
        if name in self.converted:
            return _finite(name, self.converted[name][begin:end])
        stored = self._shard.tensors[name]
        if stored.dtype not in FLOATS:
            return self._any_type(name)[begin:end]
        count = (stored.shape or (1,))[0]
        row = stored.nbytes // count if count else 0
        buffer = buffer_of((end - begin) * row)
        with opened(self.file.weights_path, adapter_unreadable) as file:
            file.read_into(buffer, stored.begin + begin * row)
        return _finite(name, buffer.view(torch_dtype(stored.dtype)).view(end - begin, *stored.shape[1:]))

    def _any_type(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            tensor = self.file.tensor(name)
        except (OSError, SafetensorError) as error:
            raise adapter_unreadable(str(self.file.weights_path), str(error)) from error
        return tensor if tensor.dim() else tensor.view(1)

    def with_converted(self, converted: Mapping[str, torch.Tensor], gone: frozenset[str]) -> AdapterTensors:
        return replace(self, converted=MappingProxyType(dict(converted)), gone=gone)

    def check(self) -> None:
        """Refuse tensors without data.

        Raises:
            MergeError: ``merge-empty-tensors``.
        """
        empty = [name for name, shape in self.shapes.items() if 0 in shape]
        if empty:
            raise MergeError(
                f"{len(empty)} of the adapter's {len(self.shapes)} tensors are empty",
                where=empty[0],
                why="it was saved from partitioned parameters (DeepSpeed ZeRO-3, FSDP) that were not gathered",
                help="save it again under deepspeed.zero.GatheredParameters, or gather the checkpoint with "
                "zero_to_fp32.py, and merge that",
                code="merge-empty-tensors",
            )


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if bool(tensor.isfinite().all()):
        return tensor
    raise MergeError(
        "the adapter holds values that are not finite",
        where=name,
        why="a NaN or an infinity would spread over every weight that it is merged into",
        help="take an earlier checkpoint of the training run",
        code="merge-not-finite",
    )
