"""The share of activations that bounded wrappers clamp, sampled while a training step runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from graftkit.modeling.bounded_wrappers import BoundedWrapper, count_clamped, watch_bounds
from graftkit.training.guard.tensor_stats import spread

if TYPE_CHECKING:
    from torch import Tensor


class Saturation:
    """Counts what bounded wrappers clamp, between ``begin`` and ``end``."""

    def __init__(self, wrappers: Iterable[BoundedWrapper]) -> None:
        self._wrappers = tuple(wrappers)
        self._clamped: dict[str, list[Tensor]] = {}
        self._elements: dict[str, int] = {}
        self._hooks = ExitStack()

    def begin(self) -> None:
        """Add hooks to the wrappers; they change nothing and do not synchronize with the device."""
        self.end()
        self._hooks.enter_context(watch_bounds(self._wrappers, self._count, spread))

    def end(self) -> Mapping[str, float]:
        """Remove the hooks, and return the clamped share of every wrapper that was called."""
        import torch

        self._hooks.close()
        clamped = {path: int(torch.stack(counts).sum()) for path, counts in self._clamped.items()}
        shares = {path: number / self._elements[path] for path, number in clamped.items()}
        self._clamped, self._elements = {}, {}
        return shares

    def _count(self, wrapper: BoundedWrapper, before: Tensor, after: Tensor) -> None:
        self._clamped.setdefault(wrapper.path, []).append(count_clamped(before, after))
        self._elements[wrapper.path] = self._elements.get(wrapper.path, 0) + before.numel()
