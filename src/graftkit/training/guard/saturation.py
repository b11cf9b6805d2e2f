"""The share of clamped activations, sampled while a training step runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftkit.checks.probes.clamps import Bounded

# Elements looked at in each tensor: enough for a share to half a percent, however large the activations are.
_SAMPLE = 4096


@dataclass
class _Count:
    clamped: list[Tensor] = field(default_factory=list)
    elements: int = 0
    inner: dict[str, Tensor] = field(default_factory=dict)


class Saturation:
    """Counts what bounded wrappers clamp, between ``begin`` and ``end``."""

    def __init__(self, wrappers: Iterable[Bounded]) -> None:
        self._wrappers = tuple(wrappers)
        self._counts: dict[str, _Count] = {}
        self._hooks = ExitStack()

    def begin(self) -> None:
        """Put hooks on the wrappers; they wait for nothing and change nothing."""
        self.end()
        for bounded in self._wrappers:
            count = self._counts.setdefault(bounded.path, _Count())
            self._watch(bounded, count)

    def end(self) -> Mapping[str, float]:
        """Take the hooks off, and say of every wrapper that was called which share it clamped."""
        import torch

        self._hooks.close()
        counts, self._counts = self._counts, {}
        called = {path: count for path, count in counts.items() if count.elements}
        shares = [torch.stack(count.clamped).sum().cpu() / count.elements for count in called.values()]
        return dict(zip(called, torch.stack(shares).tolist(), strict=True)) if shares else {}

    def _watch(self, bounded: Bounded, count: _Count) -> None:
        def after_layer(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            count.inner.update(given=_sampled(args[0]), made=_sampled(output))

        def after_wrapper(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            before = (_sampled(args[0]), count.inner.get("made"))
            after = (count.inner.get("given"), _sampled(output))
            for one, other in zip(before, after, strict=True):
                if one is not None and other is not None and one.shape == other.shape and other.numel():
                    count.clamped.append(_clamped(one, other))
                    count.elements += one.numel()
            count.inner.clear()

        for module, hook in ((bounded.layer, after_layer), (bounded.wrapper, after_wrapper)):
            self._hooks.callback(module.register_forward_hook(hook).remove)


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


def _clamped(before: Tensor, after: Tensor) -> Tensor:
    """How many elements became the smallest or the largest value there is. The answer stays on the device."""
    low, high = after.aminmax()
    return ((after != before) & ((after == low) | (after == high))).sum()
