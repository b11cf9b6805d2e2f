"""Norms and changes of the tensors that are trained, and which of them show any sign of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftkit.modeling.sharding import is_sharded
from graftkit.modeling.unwrapping import name_in_base
from graftkit.surveying.towers.find import tower_finder
from graftkit.training.distributed.collectives import sum_over_processes

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

# Elements sampled of each tensor: enough for a share to half a percent, however large the tensor is.
_SAMPLE = 4096


@dataclass(frozen=True)
class TensorStats:
    """Norms of the tensors that require a gradient, by name and by tower."""

    named: Mapping[str, nn.Parameter]
    towers: Mapping[str, str]
    sharded: bool

    @classmethod
    def of(cls, model: PeftModel) -> TensorStats:
        tower_of = tower_finder(model.get_base_model())
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return cls(named, {name: tower_of(name_in_base(name)) for name in named}, is_sharded(model))

    def norms(self, tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
        """Return the norm of each tensor that is there, in float32: one wait for each device.

        For sharded parameters this is a collective, and the norms are those of the full tensors.
        """
        norms = _local_norms({name: t for name in self.named if (t := tensors.get(name)) is not None})
        return self._full_norms(norms) if self.sharded else norms

    def _full_norms(self, norms: Mapping[str, float]) -> dict[str, float]:
        import torch

        device = next(iter(self.named.values())).device
        squares = [norms.get(name, 0.0) ** 2 for name in self.named]
        present = [float(name in norms) for name in self.named]
        sums = sum_over_processes(torch.tensor([squares, present], dtype=torch.float64, device=device)).tolist()
        return {n: math.sqrt(square) for n, square, here in zip(self.named, *sums, strict=True) if here}

    def by_tower(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Return tower -> the norm of its tensors together."""
        squares: dict[str, float] = {}
        for name, norm in norms.items():
            tower = self.towers[name]
            squares[tower] = squares.get(tower, 0.0) + norm * norm
        return {tower: math.sqrt(square) for tower, square in squares.items()}


def nonfinite(norms: Mapping[str, float]) -> tuple[str, ...]:
    """Return the tensors whose norm is NaN or infinite."""
    return tuple(name for name, norm in norms.items() if not math.isfinite(norm))


def _local_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norm of this process's shard of each tensor, without tensors of which it holds nothing."""
    import torch

    devices: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        local = _local(tensor)
        if local.numel():
            devices.setdefault(local.device, {})[name] = local
    found: dict[str, float] = {}
    for group in devices.values():
        norms = torch._foreach_norm(list(group.values()), 2, dtype=torch.float32)
        found.update(zip(group, torch.stack(norms).tolist(), strict=True))
    return found


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, also while ZeRO-3 gathers a small one."""
    local: Tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return local.to_local() if hasattr(local, "to_local") else local


def sample(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return some elements of every tensor, in float32."""
    return {name: _sampled(parameter) for name, parameter in named.items()}


def changes_since(before: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the change of the sampled elements, scaled to the norm of the full tensor's change."""
    return {name: _scaled(_sampled(named[name]) - was, named[name]) for name, was in before.items()}


def _scaled(change: Tensor, parameter: Tensor) -> Tensor:
    return change * math.sqrt(_local(parameter).numel() / max(1, change.numel()))


def _sampled(parameter: Tensor) -> Tensor:
    import torch

    return spread(_local(parameter)).to(torch.float32, copy=True)


def spread(tensor: Tensor) -> Tensor:
    """Return some elements of a tensor, evenly spread over it, as a view where its layout allows one."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


@dataclass
class TensorActivity:
    """Which tensors got a gradient, and which were changed, on the steps recorded so far.

    Attributes:
        zero_at_start: the tensors that began as zeros.
        zero: the tensors that were zeros after the last recorded step.
    """

    names: tuple[str, ...]
    zero_at_start: frozenset[str]
    steps: int = 0
    saw_gradients: bool = False
    with_gradient: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    zero: frozenset[str] = frozenset()

    def record(
        self, gradients: Mapping[str, float], weights: Mapping[str, float], changes: Mapping[str, float]
    ) -> None:
        """Record the norms of one step at a learning rate above zero."""
        self.steps += 1
        self.saw_gradients = self.saw_gradients or bool(gradients)
        self.with_gradient |= {name for name, norm in gradients.items() if norm}
        self.changed |= {name for name, norm in changes.items() if norm}
        self.zero = frozenset(name for name, norm in weights.items() if not norm)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The tensors whose gradient was zero on every step, or which are still the zeros they began as."""
        zero_gradient = set(self.names) - self.with_gradient if self.saw_gradients else set()
        still_zero = self.zero_at_start & self.zero
        return tuple(name for name in self.names if name in zero_gradient | still_zero)

    @property
    def nothing_changes(self) -> bool:
        """Whether there are gradients, and no tensor was changed."""
        return bool(self.with_gradient) and not self.changed
