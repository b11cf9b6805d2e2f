"""What a plan costs: trainable parameters exactly, memory as the sum of its known parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from graftkit.surveying.sites import Site


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training needs besides activations, which depend on the batch.

    Attributes:
        base_weights: the frozen model, at two bytes a parameter.
        adapter_weights: the adapter, at four bytes a parameter (PEFT keeps it in float32 on a 16-bit base).
        gradients: four bytes a trainable parameter.
        optimizer: AdamW's two moments, eight bytes a trainable parameter.
    """

    base_weights: int
    adapter_weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.base_weights + self.adapter_weights + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_weights": self.base_weights,
            "adapter_weights": self.adapter_weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "total": self.total,
            "unit": "bytes",
            "assumes": "base in 16 bit, adapter in 32 bit, AdamW; activations not counted",
        }


def memory_of(base_params: int, trainable: int) -> Memory:
    """Memory for ``base_params`` frozen and ``trainable`` trained parameters."""
    return Memory(2 * base_params, 4 * trainable, 4 * trainable, 8 * trainable)


def trainable_params(sites: Iterable[Site], *, r: int, dora: bool = False) -> int:
    """Trainable elements of LoRA at rank ``r`` on ``sites``.

    A matrix of ``out x in`` gets ``r * (in + out)``; DoRA adds one magnitude per output. ``E`` stacked
    experts get ``E`` times that. Source: ``peft.tuners.lora.layer``.
    """
    return sum(_site_params(site, r, dora) for site in sites)


def _site_params(site: Site, r: int, dora: bool) -> int:
    stacked, (out, into) = _matrix(site)
    return stacked * r * (out + into) + (out if dora else 0)


def _matrix(site: Site) -> tuple[int, tuple[int, int]]:
    """(how many matrices are stacked, (output, input) elements of one)."""
    if site.kind == "parameter" and len(site.shape) == 3:
        return site.shape[0], (site.shape[1], site.shape[2])
    if site.kind == "conv":
        return 1, (site.shape[0], prod(site.shape[1:]))
    if site.kind == "conv1d_transposed":
        return 1, (site.shape[1], site.shape[0])
    if site.kind == "embedding":
        return 1, (site.shape[1], site.shape[0])
    return 1, (site.shape[0], site.shape[1])
