"""An adapter's tensors, read by position when needed: never mapped, so memory holds only what is in use."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.adapters.file import AdapterFile
from graftkit.errors import MergeError
from graftkit.merging.checkpoint.shards import FLOATS, torch_dtype
from graftkit.merging.errors import adapter_unreadable
from graftkit.merging.io.read import opened

if TYPE_CHECKING:
    import torch


# Experts follow each other on disk, each with two or three matrices from two of the adapter's tensors; and the
# verification is one file behind.
_CACHED = 4


@dataclass(frozen=True, eq=False)
class AdapterTensors:
    """The tensors of one adapter, as PEFT would load them.

    Attributes:
        converted: tensors that PEFT makes on loading from some of the file's (experts saved one by one).
        replaced: names of those tensors in the file.
    """

    file: AdapterFile
    converted: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    replaced: frozenset[str] = frozenset()
    _cache: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        without = self.replaced | self.file.duplicates
        stored = {name: t.shape for name, t in self.file.tensors.items() if name not in without}
        return MappingProxyType({**stored, **{name: tuple(t.shape) for name, t in self.converted.items()}})

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype.

        Raises:
            KeyError: there is none of that name.
            MergeError: ``merge-not-finite``: it contains NaN or infinity.
            AdapterError: ``adapter-weights``: the file cannot be read any more.
        """
        return self.rows(name, 0, (self.shapes[name] or (1,))[0]).view(self.shapes[name])

    def read_cached(self, name: str) -> torch.Tensor:
        """Read a tensor that the next disk tensors need too: the last few are kept in memory."""
        with self._lock:
            if name not in self._cache:
                self._cache[name] = self.read(name)
                while len(self._cache) > _CACHED:
                    self._cache.pop(next(iter(self._cache)))
            return self._cache[name]

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Read rows ``begin`` to ``end`` (of the first axis) of a tensor."""
        if name in self.converted:
            return _finite(name, self.converted[name][begin:end])
        stored = self.file.tensors[name]
        if stored.dtype not in FLOATS:
            return self._any_dtype(name)[begin:end]
        count = (stored.shape or (1,))[0]
        row = stored.nbytes // count if count else 0
        with opened(self.file.weights_path, adapter_unreadable) as file:
            raw = file.read(stored.begin + begin * row, (end - begin) * row)
        return _finite(name, raw.view(torch_dtype(stored.dtype)).view(end - begin, *stored.shape[1:]))

    def _any_dtype(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            tensor = self.file.tensor(name)
        except (OSError, SafetensorError) as error:
            raise adapter_unreadable(str(self.file.weights_path), str(error)) from error
        return tensor if tensor.dim() else tensor.view(1)

    def check_not_empty(self) -> None:
        """Refuse an adapter with tensors that have no elements.

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
        "the adapter contains values that are not finite",
        where=name,
        why="a NaN or an infinity would spread over every weight that it is merged into",
        help="take an earlier checkpoint of the training run",
        code="merge-not-finite",
    )
