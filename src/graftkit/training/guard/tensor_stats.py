"""The adapter while it is trained: gradients, updates and weights, tensor by tensor, on a few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftkit.modeling.sharding import is_sharded
from graftkit.modeling.unwrapping import name_in_base
from graftkit.surveying.towers import tower_finder
from graftkit.training.distributed.collectives import summed

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

# Elements of each tensor that are kept, to see by how much a step moves it.
_SAMPLE = 4096


@dataclass(frozen=True)
class Point:
    """What one watched step showed.

    Attributes:
        step: the optimizer step, from 1.
        gradient: tower -> norm of its gradient; after clipping where the trainer logs no norm.
        update: tower -> norm of the step's change, relative to the norm of the weights.
        saturation: tower -> share of the activations that its bounded linears clamp, 0 to 1.
    """

    step: int
    gradient: Mapping[str, float]
    update: Mapping[str, float]
    saturation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensors:
    """The tensors that are trained, by name."""

    named: Mapping[str, nn.Parameter]
    towers: Mapping[str, str]
    parted: bool

    @classmethod
    def of(cls, model: PeftModel) -> Tensors:
        tower_of = tower_finder(model.get_base_model())
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return cls(named, {name: tower_of(name_in_base(name)) for name in named}, is_sharded(model))

    def norms(self, tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
        """The norm of each tensor that is there, in float32: one wait for each device.

        Where parameters are in parts this is a collective, and the norms are those of the whole tensors.
        """
        norms = _norms({name: t for name in self.named if (t := tensors.get(name)) is not None})
        return self._of_whole(norms) if self.parted else norms

    def _of_whole(self, norms: Mapping[str, float]) -> dict[str, float]:
        import torch

        device = next(iter(self.named.values())).device
        squares = [norms.get(name, 0.0) ** 2 for name in self.named]
        present = [float(name in norms) for name in self.named]
        sums = summed(torch.tensor([squares, present], dtype=torch.float64, device=device)).tolist()
        return {n: math.sqrt(square) for n, square, here in zip(self.named, *sums, strict=True) if here}

    def by_tower(self, norms: Mapping[str, float]) -> dict[str, float]:
        """The norm of each tower's tensors together."""
        squares: dict[str, float] = {}
        for name, norm in norms.items():
            tower = self.towers[name]
            squares[tower] = squares.get(tower, 0.0) + norm * norm
        return {tower: math.sqrt(square) for tower, square in squares.items()}

    def not_finite(self, norms: Mapping[str, float]) -> tuple[str, ...]:
        """The tensors whose norm is no number."""
        return tuple(name for name, norm in norms.items() if not math.isfinite(norm))


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of what this process holds of each tensor; those of which it holds nothing are left out."""
    import torch

    places: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        local = _local(tensor)
        if local.numel():
            places.setdefault(local.device, {})[name] = local
    found: dict[str, float] = {}
    for there in places.values():
        norms = torch._foreach_norm(list(there.values()), 2, dtype=torch.float32)
        found.update(zip(there, torch.stack(norms).tolist(), strict=True))
    return found


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; where ZeRO-3 gathers small ones whole for a while, its own part."""
    local: Tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return local.to_local() if hasattr(local, "to_local") else local


@dataclass(frozen=True)
class Sample:
    """Some elements of every tensor, as they were at one moment."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, named: Mapping[str, nn.Parameter]) -> Sample:
        return cls({name: _sampled(parameter) for name, parameter in named.items()})

    def moved(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Tensor -> by how much its elements have changed since, scaled to the length of the whole tensor."""
        return {name: _grown(_sampled(named[name]) - was, named[name]) for name, was in self.values.items()}


def _sampled(parameter: Tensor) -> Tensor:
    import torch

    flat = _local(parameter).reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.float32, copy=True)


def _grown(sample: Tensor, parameter: Tensor) -> Tensor:
    return sample * math.sqrt(_local(parameter).numel() / max(1, sample.numel()))


@dataclass
class Lives:
    """Which tensors have shown any sign of being trained."""

    names: tuple[str, ...]
    began_at_zero: frozenset[str]
    steps: int = 0
    saw_gradients: bool = False
    with_gradient: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    zero: frozenset[str] = frozenset()

    def note(
        self, gradients: Mapping[str, float], weights: Mapping[str, float], moved: Mapping[str, float]
    ) -> None:
        """One step at a learning rate above zero."""
        self.steps += 1
        self.saw_gradients = self.saw_gradients or bool(gradients)
        self.with_gradient |= {name for name, norm in gradients.items() if norm}
        self.changed |= {name for name, norm in moved.items() if norm}
        self.zero = frozenset(name for name, norm in weights.items() if not norm)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The tensors without a gradient on any of these steps, or still at the zeros that they began with."""
        unfed = set(self.names) - self.with_gradient if self.saw_gradients else set()
        still = self.began_at_zero & self.zero
        return tuple(name for name in self.names if name in unfed or name in still)

    @property
    def stuck(self) -> bool:
        """Whether gradients arrive and nothing at all is changed by them."""
        return bool(self.with_gradient) and not self.changed


class Watch:
    """Looks at the steps it is told to; between them it costs nothing."""

    def __init__(self, model: PeftModel) -> None:
        self.tensors = Tensors.of(model)
        named = self.tensors.named
        start = self.tensors.norms(named)
        self.lives = Lives(tuple(named), frozenset(name for name, norm in start.items() if not norm))
        self._before: Sample | None = None
        self._gradients: dict[str, float] = {}

    def begin(self) -> None:
        """Before the step's forward pass."""
        self._before = Sample.of(self.tensors.named)

    def gradients(self) -> tuple[str, ...]:
        """Before the optimizer's step: note the gradients; returns the tensors whose gradient is not finite."""
        self._gradients = self.tensors.norms({name: p.grad for name, p in self.tensors.named.items()})
        return self.tensors.not_finite(self._gradients)

    def end(self, step: int, *, learns: bool) -> tuple[Point, tuple[str, ...]]:
        """After the optimizer's step: what it showed, and the tensors that are not finite.

        Args:
            step: the optimizer step, from 1.
            learns: whether the learning rate was above zero.
        """
        assert self._before is not None
        weights = self.tensors.norms(self.tensors.named)
        moved = self.tensors.norms(self._before.moved(self.tensors.named))
        self._before = None
        if learns:
            self.lives.note(self._gradients, weights, moved)
        whole, part = self.tensors.by_tower(weights), self.tensors.by_tower(moved)
        update = {tower: part[tower] / size for tower, size in whole.items() if size and tower in part}
        return Point(step, self.tensors.by_tower(self._gradients), update), self.tensors.not_finite(weights)
