"""How often the bounds around a model's linears clamp what passes through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import logits_of
from graftkit.checks.probes.live_adapter import adapted_layers
from graftkit.modeling.bounded_wrappers import BoundedWrapper, bounded_wrappers, count_clamped, watch_bounds

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


@dataclass
class _Count:
    clamped: int = 0
    elements: int = 0
    finite: bool = True

    @property
    def share(self) -> float:
        return self.clamped / self.elements if self.finite else float("nan")


def clamped_shares(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return, by wrapper path, the share of its inputs and outputs that it clamps on this batch, 0 to 1.

    Wrappers that the batch does not reach are left out. An element is clamped where the wrapper changes it to the
    smallest or the largest value there is. The share is NaN where activations are not finite.
    """
    wrappers = bounded_wrappers(model)
    counts = {wrapper.path: _Count() for wrapper in wrappers}

    def count(wrapper: BoundedWrapper, before: Tensor, after: Tensor) -> None:
        seen = counts[wrapper.path]
        seen.clamped += int(count_clamped(before, after))
        seen.elements += before.numel()
        seen.finite = seen.finite and bool(before.isfinite().all())

    with watch_bounds(wrappers, count):
        logits_of(model, batch)
    return {path: count.share for path, count in counts.items() if count.elements}


def wrapper_effect(model: PeftModel, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many adapted linears have bounds, and how many of those bounds clamp something on this batch."""
    adapted = set(adapted_layers(model).values())
    wrappers = [wrapper for wrapper in bounded_wrappers(model) if wrapper.layer in adapted]
    reached: set[str] = set()

    def compare(wrapper: BoundedWrapper, before: Tensor, after: Tensor) -> None:
        if not before.equal(after):
            reached.add(wrapper.path)

    with watch_bounds(wrappers, compare):
        logits_of(model, batch)
    return len(wrappers), len(reached)
