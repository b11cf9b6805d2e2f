"""Linears with bounds around them, adapted or not: what the bounds are, and how often they bite."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import logits_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Bounded:
    """A module around one linear that changes what goes in or comes out.

    Attributes:
        path: of the module.
        wrapper: the module: it has buffers that are single numbers, and no parameter but the linear's.
        layer: the linear, or PEFT's layer in its place.
    """

    path: str
    wrapper: nn.Module
    layer: nn.Module

    @property
    def bounds(self) -> dict[str, Tensor]:
        """The bounds that a checkpoint holds, by name: single numbers."""
        transient = self.wrapper._non_persistent_buffers_set
        return {
            name: buffer
            for name, buffer in self.wrapper.named_buffers(recurse=False)
            if buffer.ndim == 0 and buffer.is_floating_point() and name not in transient
        }


def bounded_wrappers(model: nn.Module) -> list[Bounded]:
    """Every bounded wrapper of the model, in its order."""
    found = ((path, module, _only_linear(module)) for path, module in model.named_modules())
    return [Bounded(path, module, layer) for path, module, layer in found if layer is not None]


def _only_linear(module: nn.Module) -> nn.Module | None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    children = list(module.children())
    if len(children) != 1 or not isinstance(children[0], nn.Linear | BaseTunerLayer):
        return None
    numbers = (b for b in module.buffers(recurse=False) if b.ndim == 0 and b.is_floating_point())
    if isinstance(module, BaseTunerLayer) or not any(True for _ in numbers):
        return None
    return children[0] if not any(True for _ in module.parameters(recurse=False)) else None


@dataclass
class _Count:
    clamped: int = 0
    elements: int = 0
    finite: bool = True
    inner: dict[str, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.clamped / self.elements if self.finite else float("nan")


def clamped_shares(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Wrapper -> the share of its inputs and outputs that it clamps on this batch.

    Wrappers that the batch does not reach are left out. An element is clamped where the wrapper changes it to the
    smallest or the largest value there is. Not a number where activations are not finite.
    """
    wrappers = bounded_wrappers(model)
    counts = {bounded.path: _Count() for bounded in wrappers}
    with ExitStack() as hooks:
        for bounded in wrappers:
            _watch(hooks, bounded, counts[bounded.path])
        logits_of(model, batch)
    return {path: count.share for path, count in counts.items() if count.elements}


def _watch(hooks: ExitStack, bounded: Bounded, count: _Count) -> None:
    def after_layer(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        count.inner.update(given=args[0].detach(), made=output.detach())

    def after_wrapper(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not count.inner:
            return  # it did not call its linear
        for before, after in ((args[0], count.inner["given"]), (count.inner["made"], output)):
            count.clamped += _clamped(before.detach(), after.detach())
            count.elements += before.numel()
            count.finite = count.finite and bool(before.isfinite().all())
        count.inner.clear()

    for module, hook in ((bounded.layer, after_layer), (bounded.wrapper, after_wrapper)):
        hooks.callback(module.register_forward_hook(hook).remove)


def _clamped(before: Tensor, after: Tensor) -> int:
    if before.shape != after.shape or not after.numel():
        return 0
    low, high = after.aminmax()
    return int(((after != before) & ((after == low) | (after == high))).sum())
